"""Nodes that let a distriray service draw."""

from .nodes import DistrirayEdit, DistrirayGenerate

NODE_CLASS_MAPPINGS = {"DistrirayGenerate": DistrirayGenerate, "DistrirayEdit": DistrirayEdit}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DistrirayGenerate": "distriray: Generate",
    "DistrirayEdit": "distriray: Edit",
}
