"""Nodes that let a distriray service draw."""

from .nodes import DistrirayControl, DistrirayEdit, DistrirayGenerate

NODE_CLASS_MAPPINGS = {
    "DistrirayGenerate": DistrirayGenerate,
    "DistrirayEdit": DistrirayEdit,
    "DistrirayControl": DistrirayControl,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DistrirayGenerate": "distriray: Generate",
    "DistrirayEdit": "distriray: Edit",
    "DistrirayControl": "distriray: Control",
}
