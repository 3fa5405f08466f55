"""Hugging Face checkpoints: read into any mesh, written from any checkpoint, held against transformers."""
