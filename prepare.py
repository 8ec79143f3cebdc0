def make_demo(p): raise ValueError("not yet")
