"""OpenAI's Images API over any service that draws: FastAPI, no Ray."""

from deployments.http.app import build_http as build_http
from deployments.http.config import HttpConfig as HttpConfig
