def test_smoke(server, client):
    out = client.completions.create(model="tiny", prompt="hello", max_tokens=5, seed=1)
    print(out)
    print(server.lines)
