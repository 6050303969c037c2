"""The arguments of `jitjax`, and its help."""

from __future__ import annotations

from pathlib import Path

from jitjax import cli_conditioning, cli_image, cli_negative, cli_trace, images
from jitjax.arguments import Parser
from jitjax.loading import bundled
from jitjax.models.quantised import KINDS
from jitjax.sampler.plan import CHOICES, DEFAULT_PLAN, PLANS, SOLVERS

COMMANDS = {
    "memory": "jitjax.memory.command",
    "info": "jitjax.info",
    "convert": "jitjax.convert.__main__",
}
"""First argument that selects another command -> the module of the command."""

USAGE = f"""\
jitjax PROMPT [OPTIONS]
       jitjax {"|".join(COMMANDS)} [-h] ...
"""

EXAMPLES = """\
examples:
  jitjax "a large red circle"                         writes jitjax.png
  jitjax "a blue star" --count 4 -o star.png          star-0.png to star-3.png
  jitjax "a red star" --plan 4x --trace run.png       and a figure of the run
  jitjax "a red star" --image cat.png --strength 0.6  from a picture
  jitjax "a red star" --image cat.png --mask sky.png  new in a part of it
  jitjax "a red star" --negative "stripes"            away from stripes
  jitjax --prompts list.txt -o pictures               a prompt per line
  jitjax convert FLUX.1-dev --out flux-dev            for --checkpoint flux-dev
"""

SHORT_END = """
exit status: 0 done, 1 lines of a list failed, 2 not possible, 130 Ctrl-C
"""

FULL_END = """
An existing file is replaced only with --overwrite. The same seed gives the same picture, whatever
the count. The prompt and the settings are stored in the text chunks of the PNG file. A list has a
prompt per line, or is JSON lines such as
  {"prompt": "a red star", "seed": 7, "size": "512x384", "plan": "dense", "negative": "blue"}
After Ctrl-C or a change of the list the same command makes what is not there yet. There is more
about lists, encoded prompts and the cache of compiled programs in docs/command-line.md.

A word that is a command, as a prompt: jitjax -- memory

exit status: 0 done; 1 lines of the list have failed, the rest is made; 2 not possible, with a line
that says why; 130 stopped by Ctrl-C; 143 stopped by SIGTERM; 1 with a traceback: an unexpected
error.
"""


def build_parser() -> Parser:
    """Return the parser of `jitjax`; its subcommands have others."""
    parser = Parser(
        prog="jitjax",
        usage=USAGE,
        description="Make a picture from a prompt with FLUX, accelerated by Just-in-Time.",
        epilog=EXAMPLES + SHORT_END,
        full_epilog=EXAMPLES + FULL_END,
        completion={
            "prompt": COMMANDS,
            "plan": PLANS,
            "solver": SOLVERS,
            "microflow": CHOICES["microflow"],
            "quantise": KINDS,
            "checkpoint": bundled(),
        },
    )
    add = parser.add_argument_group("what to make").add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what it shows; - reads it from standard input")
    add(
        "--prompts",
        metavar="FILE",
        help="a list with a prompt per line; - is standard input\nThe pictures are written as they "
        "are made, into a folder",
    )
    add(
        "--batch",
        type=int,
        metavar="N",
        help="\nwith --prompts, most pictures to make at once (default: 1); they share size and "
        "plan",
    )
    add(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help=f"PNG file (default: {images.DEFAULT_OUT}, or a free name)\nWith --count, "
        "FILE-SEED.png; with --prompts FILE.txt, a folder (default: FILE-pictures)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace files that exist\nWith --prompts, those that are other pictures",
    )
    add(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="pictures of each prompt (default: %(default)s)\nTheir seeds are consecutive",
    )
    add(
        "--size",
        metavar="SIZE",
        help="pixels: SIDE or WIDTHxHEIGHT (default: the model's)\nMultiples of 16. By default the "
        "size that the model was trained for, or that of --image, --control or --reference",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed, below 2**64 (default: %(default)s)",
    )
    cli_trace.add_arguments(add)

    add = parser.add_argument_group("how to draw").add_argument
    add(
        "--plan",
        default=DEFAULT_PLAN,
        metavar="NAME",
        help=f"{', '.join(PLANS)} (default: %(default)s)\ndense takes 50 steps of Euler's method, "
        "the multistep plans 12 and 7 of second order; 4x and 7x are the paper's; jit-10x and "
        "jit-14x need 10 and 14 times fewer operations than dense",
    )
    add("--steps", type=int, metavar="N", help="number of steps (default: the plan's)")
    add(
        "--solver",
        metavar="|".join(SOLVERS),
        help="\nhow steps are taken; multistep is of second order (default: that of the plan)",
    )
    add(
        "--microflow",
        metavar="|".join(CHOICES["microflow"]),
        help="\nhow newly active tokens move to their target: hit is the paper's equation, blend "
        "the authors' program (default: that of the plan)",
    )
    add(
        "--guidance",
        type=float,
        default=3.5,
        metavar="SCALE",
        help="how closely to follow the prompt (default: %(default)s)",
    )
    cli_negative.add_arguments(add)
    cli_image.add_arguments(parser.add_argument_group("pictures to start from").add_argument)

    add = parser.add_argument_group("model and memory").add_argument
    add(
        "--checkpoint",
        default="tiny",
        metavar="FOLDER",
        help=f"from jitjax convert, or {', '.join(bundled())} (default: %(default)s)",
    )
    add(
        "--quantise",
        metavar="KIND",
        help=f"smaller weights: {', '.join(KINDS)}\nThey are quantised while they are loaded: int8 "
        "and float8 take half the memory of bfloat16, int4 a quarter at a loss of quality "
        "(default: as they are stored)",
    )
    cli_conditioning.add_arguments(add)
    return parser
