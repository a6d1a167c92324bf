check: ; ruff format --check . && ruff check . && mypy && PYTHONPATH=kernels lint-imports
