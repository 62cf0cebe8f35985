"""The programs that made the embedded target whose weights the package ships."""
