"""`jitjax memory`: says what a picture needs before anything is loaded or compiled."""

from __future__ import annotations

from collections.abc import Sequence

from jitjax import command
from jitjax.arguments import Parser
from jitjax.checkpoint import PARTS
from jitjax.memory.estimate import DTYPES, estimate_memory
from jitjax.memory.models import NAMED
from jitjax.memory.programs import PLATFORMS
from jitjax.memory.report import WITHOUT_ENCODERS, text_report, what_fits
from jitjax.models.quantised import KINDS
from jitjax.picture import parse_size
from jitjax.sampler.plan import DEFAULT_PLAN, PLANS

EXAMPLES = """\
examples:
  jitjax memory flux-dev                                  FLUX.1-dev in bfloat16, one picture
  jitjax memory flux-dev --size 2048 --batch 4 --plan 4x  larger pictures, four at a time
  jitjax memory flux-schnell --quantise int8              one byte per weight
  jitjax memory flux-dev --mesh 2x4                       each of 8 cards: data x model
  jitjax memory flux-dev --without-encoders               with a saved conditioning
  jitjax memory ./my-checkpoint                           a converted checkpoint
  jitjax memory flux-dev --image --negative               from a picture, with a negative prompt
  jitjax memory --table                                   what fits where, in Markdown

Nothing is loaded or compiled. A picture of the word itself: jitjax -- memory

exit status: 0 done, 2 not possible, with a line that says why
"""


def build_parser(prog: str) -> Parser:
    """Return the argument parser of a command with the name `prog`."""
    parser = Parser(
        prog=prog,
        description="Say what device, host and disk need, part by part, and which cards it fits.",
        usage=f"{prog} NAME_OR_FOLDER [OPTIONS]",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="NAME or FOLDER",
        help=f"a checkpoint, or {', '.join(NAMED)} (from the configuration alone, if there is no "
        "such folder)",
    )
    parser.add_argument("--size", metavar="SIDE or WIDTHxHEIGHT", help="pixels, multiples of 16")
    parser.add_argument("--batch", type=int, default=1, help="pictures at a time (default: 1)")
    parser.add_argument(
        "--plan", default=DEFAULT_PLAN, metavar="|".join(PLANS), help="default: %(default)s"
    )
    parser.add_argument(
        "--dtype",
        metavar="|".join(DTYPES),
        help="of what is not quantised (default: the checkpoint's, or bfloat16)",
    )
    parser.add_argument(
        "--quantise", metavar="|".join(KINDS), help="kernels of the transformer and of T5"
    )
    parser.add_argument(
        "--mesh",
        metavar="DATAxMODEL",
        help="several devices, or DATAxFSDPxMODEL; the figures are those of each",
    )
    parser.add_argument(
        "--without-encoders", action="store_true", help="prompts are encoded already"
    )
    parser.add_argument("--image", action="store_true", help="there is a picture to start from")
    parser.add_argument(
        "--negative", action="store_true", help="there is a negative prompt: two passes per step"
    )
    parser.add_argument(
        "--platform", default="gpu", metavar="|".join(PLATFORMS), help="default: %(default)s"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the table of docs/scaling.md instead"
    )
    return parser


def main(arguments: Sequence[str], *, prog: str = "jitjax memory") -> int:
    """Run the command, and return the exit status.

    Args:
        arguments: what follows `jitjax memory`.
        prog: the name of the command.
    """
    return command.run_report(lambda: _run(arguments, prog), error_prefix=f"{prog}: error: ")


def _run(arguments: Sequence[str], prog: str) -> int:
    parser = build_parser(prog)
    args = parser.parse_args(arguments)
    if args.table:
        if len(arguments) > 1:
            parser.error("--table takes no other arguments")
        command.report(what_fits().rstrip("\n"))
        return 0
    if args.checkpoint is None:
        parser.error(
            f"expected a checkpoint, {' or '.join(NAMED)} (a picture of the word: jitjax -- memory)"
        )
    width, height = (None, None) if args.size is None else parse_size(args.size)
    estimate = estimate_memory(
        str(args.checkpoint),
        height=height,
        width=width,
        batch=args.batch,
        plan=args.plan,
        dtype=args.dtype,
        quantise=args.quantise,
        mesh=args.mesh,
        parts=WITHOUT_ENCODERS if args.without_encoders else PARTS,
        platform=args.platform,
        image=args.image,
        negative=args.negative,
    )
    command.report(text_report(estimate))
    return 0
