"""What is converted: folders, single files and the hub, their tensors and layouts."""
