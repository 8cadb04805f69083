"""Passwords and tokens in addresses, connection strings, library messages and the environment."""

import pytest

from harness.output.masking import masked

SECRET = "s3cr3t"
HIDDEN = (
    "http://me:s3cr3t@host:5000",
    "http://me:p@s3cr3t@host:5000/x",
    "postgresql://me:two s3cr3t@host/db",
    "http://me:p:s3cr3t@host",
    "http://me:p/s3cr3t@host/x",
    "https://s3cr3t@host/x",
    "postgresql://u:p@host/db?password=s3cr3t&sslmode=require",
    "?PASSWORD=s3cr3t",
    "x?sslpassword=s3cr3t",
    "x?pass%77ord=s3cr3t",
    "mysql://host/?passwd=s3cr3t",
    "token=s3cr3t",
    "hf_token = s3cr3t",
    "api_key=s3cr3t&a=b",
    "apikey=s3cr3t",
    "AccountKey=s3cr3t==;X=y",
    "DRIVER={X};UID=me;PWD=s3cr3t;Database=y",
    "PWD={a;s3cr3t}}b};Database=y",
    "PWD = two s3cr3t;Database=y",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BX%7D%3BUID%3Dme%3BPWD%3Ds3cr3t%3BDATABASE%3Dy",
    "odbc_connect=PWD%3D%7Bs3cr3t%3Bs3cr3t%7D%3BDATABASE%3Dy",
    "odbc_connect=PWD%253Ds3cr3t%253BDATABASE%253Dy",
    "odbc_connect=PWD+%3D+s3cr3t%3B",
    "host=h password=s3cr3t dbname=x",
    r"password = 'it\'s s3cr3t' host=x",
    r"password=my\ s3cr3t host=x",
    'password="my s3cr3t"',
    "password=it's3cr3t",
    "{'password': 's3cr3t', 'host': 'x'}",
    '{"api_key": "s3cr3t"}',
    "Authorization: Bearer s3cr3t",
    "Authorization: Basic s3cr3tczNj",
    "authorization: s3cr3t",
    "X-API-Key: s3cr3t",
    "secret_key=s3cr3t",
    "password: s3cr3t",
    "MLFLOW_TRACKING_PASSWORD: 's3cr3t'",
    "--set 'train.deepspeed={comet: {api_key: s3cr3t}}'",
    "https://host/?pw=s3cr3t",
    "--password s3cr3t",
    "--token 's3cr3t'",
    "wasbs://x.blob/?sv=2020&sig=s3cr3t",
    "https://host/?auth=s3cr3t&key=s3cr3t",
    f"got hf_{'Ab3' * 10}s3cr3t",
)
"""Each holds one secret in some way, `s3cr3t`, or a part of it."""
SHOWN = (
    "--set predict.max_new_tokens=24 --set train.max_caption_tokens=32",
    'password authentication failed for user "harness"',
    "harness run experiments/a.yaml --set data.root=/x/y@z",
    "https://host:5000/#/runs/1",
    "Basic metabolic panel",
    "see http://localhost:5000 and mail me@example.org",
    "Basic interpretation of the image, bearer of the gene",
    "token: 5, pass: 3 cm, key: 4",
    "tok.en@example.org and 016@2.jpg",
    "sqlite:////tmp/x/mlflow.db",
)


@pytest.mark.parametrize("text", HIDDEN)
def test_no_secret_is_left(text):
    assert SECRET not in masked(f"error: {text}")
    assert SECRET not in masked(text)


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_no_secret_is_shown(text):
    assert masked(text) == text


def test_what_stands_around_a_secret_is_shown():
    assert masked("host=h password=s3cr3t dbname=x") == "host=h password=*** dbname=x"
    assert masked("postgresql://u:p@host/db?password=s3cr3t&a=b") == "postgresql://host/db?password=***&a=b"


def test_secrets_of_the_environment_are_hidden_in_any_place(monkeypatch):
    """psycopg names as host what stands after the first @ of a password."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://u:first@s3cr3t@host/db")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken-of-mine")
    assert SECRET not in masked("failed to resolve host 's3cr3t@host'")
    assert "t0ken" not in masked("got t0ken-of-mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:a%20blank%40@host")
    assert "blank" not in masked("wrong: 'a blank@'")


def test_a_long_text_is_masked_at_once():
    assert len(masked("x" * 1_000_000 + " password=s3cr3t")) == 1_000_013
