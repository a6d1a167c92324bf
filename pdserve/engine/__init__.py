"""The paged engine under both kinds of worker: block pool, prefix cache, model runner, sampler."""
