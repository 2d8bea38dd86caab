"""What people do with the runtime. Each tool is a module with ``main(argv)``, reached as ``fastdms NAME``."""
