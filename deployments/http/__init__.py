"""OpenAI's Images API over any service that draws: FastAPI, no Ray."""

from .app import build_http as build_http
from .config import HttpConfig as HttpConfig
from .service import Fleet as Fleet
from .service import ModelCard as ModelCard
from .service import PoolReport as PoolReport
from .service import Service as Service
