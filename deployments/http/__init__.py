"""OpenAI's Images API over any service that draws: FastAPI, no Ray."""
