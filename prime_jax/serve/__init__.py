"""Prediction over HTTP (extra `serve`)."""
