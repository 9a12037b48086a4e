"""Adapter folders: saved, read strictly, shared with hubs and with PEFT."""
