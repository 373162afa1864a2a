"""Where questions, clips and teacher trajectories come from."""

import nanosport as nanosport  # first: it has Ctrl-C end the imports of a command in one line
