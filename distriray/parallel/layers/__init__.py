"""Drop-in layers that compute on one rank's rows; each shares the parameters of the layer it replaces."""
