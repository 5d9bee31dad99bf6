"""The engine: scheduler, blocks, model and sampler bound into a loop, with an offline door (`llm`) and one for the server
(`async_engine`). Never imports training, service or server."""
