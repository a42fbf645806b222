"""Tools that run: servers of the Model Context Protocol (MCP) that the operator names in --mcp-config.

`config` reads the file. `transport`, `guard`, `stdio` and `http` carry messages. `client` speaks the
protocol. `server` keeps one server running, and `toolbox` offers the tools of all of them."""
