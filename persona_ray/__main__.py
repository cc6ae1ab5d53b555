"""`python -m persona_ray`: the command line where no script is on the path, as on the nodes of a cluster."""

from persona_ray.cli import main

if __name__ == "__main__":
    main()
