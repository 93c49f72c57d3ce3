"""The core of a primer's session with the Python client: session.py KUBECONFIG"""

import sys

from kubernetes import client, config, watch
from kubernetes.client.rest import ApiException
from kubernetes.stream import stream

NAMESPACE = "default"
LABELS = {"app": "talk"}


def available(apps, since, count):
    for event in watch.Watch().stream(
        apps.list_namespaced_deployment, NAMESPACE, field_selector="metadata.name=talk",
        resource_version=since, timeout_seconds=60,
    ):
        if event["object"].status.available_replicas == count:
            return
    sys.exit("the watch ended before %d replicas were available" % count)


def main():
    config.load_kube_config(sys.argv[1])
    core, apps = client.CoreV1Api(), client.AppsV1Api()
    container = client.V1Container(
        name="main", image="busybox", command=["sh", "-c", "echo hello; sleep 100000"])
    deployment = client.V1Deployment(
        metadata=client.V1ObjectMeta(name="talk"),
        spec=client.V1DeploymentSpec(
            replicas=1,
            selector=client.V1LabelSelector(match_labels=LABELS),
            template=client.V1PodTemplateSpec(
                metadata=client.V1ObjectMeta(labels=LABELS),
                spec=client.V1PodSpec(containers=[container], termination_grace_period_seconds=0)),
        ),
    )
    made = apps.create_namespaced_deployment(NAMESPACE, deployment)
    available(apps, made.metadata.resource_version, 1)
    patched = apps.patch_namespaced_deployment("talk", NAMESPACE, {"spec": {"replicas": 2}})
    available(apps, patched.metadata.resource_version, 2)

    pods = core.list_namespaced_pod(NAMESPACE, label_selector="app=talk").items
    assert len(pods) == 2, pods
    name = pods[0].metadata.name
    for line in watch.Watch().stream(core.read_namespaced_pod_log, name, NAMESPACE):
        assert line == "hello", line
        break
    said = stream(core.connect_get_namespaced_pod_exec, name, NAMESPACE, command=["echo", "out"],
                  stdout=True, stderr=True, stdin=False, tty=False)
    assert said == "out\n", repr(said)  # no terminal: "tty=False" goes out with a capital
    shell = stream(core.connect_get_namespaced_pod_exec, name, NAMESPACE, command=["sh", "-c", "read a; echo got $a; exit 4"],
                   stdout=True, stderr=True, stdin=True, tty=False, _preload_content=False)
    shell.write_stdin("word\n")
    shell.run_forever(timeout=30)
    assert shell.read_stdout() == "got word\n"
    assert shell.returncode == 4, shell.returncode

    try:
        apps.create_namespaced_deployment(NAMESPACE, deployment)
        sys.exit("a second one was made")
    except ApiException as error:
        assert (error.status, error.reason) == (409, "Conflict"), error
    seen = core.list_namespaced_pod(NAMESPACE, label_selector="app=talk")
    apps.delete_namespaced_deployment("talk", NAMESPACE, propagation_policy="Foreground")
    left = {pod.metadata.name for pod in seen.items}
    for event in watch.Watch().stream(
        core.list_namespaced_pod, NAMESPACE, label_selector="app=talk",
        resource_version=seen.metadata.resource_version, timeout_seconds=60,
    ):
        if event["type"] == "DELETED":
            left.discard(event["object"].metadata.name)
        if not left:
            break
    assert not left, left
    print("the session is over")


main()
