"""The rooms of chat_server: `common` is what both houses use, `worker` computes, `front` serves."""

__version__ = "0.1.0"
