"""Makes one run of ``unmask train``: its settings, its training, its folder."""
