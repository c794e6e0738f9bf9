"""OpenAI's Images API over any service that draws: FastAPI, no Ray."""

from .app import build_http as build_http
from .config import HttpConfig as HttpConfig
