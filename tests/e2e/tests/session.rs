//! The session of any Kubernetes primer, with the real kubectl, the Python client and kube.

use weft_tests_e2e::{cluster, eventually, nginx, sleeper};
use weft_tests_harness::cluster::Cluster;

/// One cluster for the whole session: a primer's steps build on each other.
#[test]
fn primer() -> anyhow::Result<()> {
    let Some(mut cluster) = cluster("session::primer", "primer", &[])? else { return Ok(()) };
    create_and_look(&cluster)?;
    roll(&cluster)?;
    change(&cluster)?;
    logs_and_exec(&cluster)?;
    ask(&cluster)?;
    bad_input(&cluster)?;
    delete(&cluster)?;
    cluster.purge()
}

fn create_and_look(cluster: &Cluster) -> anyhow::Result<()> {
    assert_eq!(cluster.apply(&nginx("web", 2))?, "deployment.apps/web created\n");
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let wide = cluster.kubectl(&["get", "pods", "-l", "app=web", "-o", "wide"])?;
    let header = wide.lines().next().unwrap_or_default();
    assert_eq!(
        header.split_whitespace().collect::<Vec<_>>().join(" "),
        "NAME READY STATUS RESTARTS AGE IP NODE NOMINATED NODE READINESS GATES"
    );
    assert_eq!(wide.matches(" 1/1 ").count(), 2, "{wide}");
    assert_eq!(wide.matches(" 10.42.").count(), 2, "{wide}");
    let deployment = cluster.kubectl(&["get", "deployment", "web"])?;
    assert!(deployment.contains("2/2     2            2"), "{deployment}");
    let names = cluster.kubectl(&["get", "pods", "-l", "app=web", "-o", "name"])?;
    assert!(names.lines().all(|line| line.starts_with("pod/web-")) && names.lines().count() == 2, "{names}");
    let json = cluster.kubectl(&["get", "deployment", "web", "-o", "json"])?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    assert_eq!(json["status"]["readyReplicas"], 2);
    cluster.kubectl(&["get", "pods", "-A", "-o", "yaml"])?;
    let described = cluster.kubectl(&["describe", "deployment", "web"])?;
    for part in ["RollingUpdateStrategy:", "2 available", "ScalingReplicaSet"] {
        assert!(described.contains(part), "{part} in {described}");
    }
    let described = cluster.kubectl(&["describe", "pods", "-l", "app=web"])?;
    for part in ["Scheduled", "Pulled", "Created", "Started", "Successfully assigned default/web-"] {
        assert!(described.contains(part), "{part} in {described}");
    }
    Ok(())
}

fn roll(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["set", "env", "deployment/web", "COLOUR=green"])?;
    let status = cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    assert!(status.contains("deployment \"web\" successfully rolled out"), "{status}");
    let history = cluster.kubectl(&["rollout", "history", "deployment/web"])?;
    assert!(history.contains("\n1 ") && history.contains("\n2 "), "{history}");
    cluster.kubectl(&["rollout", "undo", "deployment/web"])?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let env = cluster.kubectl(&[
        "get",
        "deployment",
        "web",
        "-o",
        "jsonpath={.spec.template.spec.containers[0].env}",
    ])?;
    assert_eq!(env, "");
    cluster.kubectl(&["set", "image", "deployment/web", "nginx=docker.io/library/nginx:1.22"])?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    assert_eq!(
        cluster.kubectl(&["scale", "deployment/web", "--replicas=3"])?,
        "deployment.apps/web scaled\n"
    );
    cluster.kubectl(&[
        "wait",
        "deployment/web",
        "--for=jsonpath={.status.readyReplicas}=3",
        "--timeout=60s",
    ])?;
    Ok(())
}

fn change(cluster: &Cluster) -> anyhow::Result<()> {
    assert_eq!(cluster.kubectl(&["label", "deployment/web", "tier=front"])?, "deployment.apps/web labeled\n");
    assert_eq!(
        cluster.kubectl(&["annotate", "deployment/web", "note=x"])?,
        "deployment.apps/web annotated\n"
    );
    for (kind, patch) in [
        ("json", r#"[{"op":"replace","path":"/metadata/labels/tier","value":"back"}]"#),
        ("merge", r#"{"metadata":{"annotations":{"note":null}}}"#),
        (
            "strategic",
            r#"{"spec":{"template":{"spec":{"containers":[{"name":"nginx","env":[{"name":"A","value":"1"}]}]}}}}"#,
        ),
    ] {
        let said = cluster.kubectl(&["patch", "deployment/web", "--type", kind, "-p", patch])?;
        assert_eq!(said, "deployment.apps/web patched\n");
    }
    let json: serde_json::Value =
        serde_json::from_str(&cluster.kubectl(&["get", "deployment", "web", "-o", "json"])?)?;
    assert_eq!(json["metadata"]["labels"]["tier"], "back");
    assert_eq!(json["metadata"]["annotations"].get("note"), None);
    assert_eq!(json["spec"]["template"]["spec"]["containers"][0]["image"], "docker.io/library/nginx:1.22");
    assert_eq!(json["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"], "1");
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let said = cluster.kubectl(&["expose", "deployment/web", "--port=80"])?;
    assert_eq!(said, "service/web exposed\n");
    cluster.apply(&sleeper("client", None))?;
    cluster.kubectl(&["wait", "pod/client", "--for=condition=Ready", "--timeout=60s"])?;
    let page = eventually(cluster, &["exec", "client", "--", "wget", "-qO-", "http://web/"], |page| {
        !page.is_empty()
    })?;
    assert!(page.contains("nginx answers"), "{page}");
    Ok(())
}

fn logs_and_exec(cluster: &Cluster) -> anyhow::Result<()> {
    let log = cluster.kubectl(&["logs", "deployment/web", "-c", "nginx", "--tail=5"])?;
    assert!(log.lines().count() <= 5, "{log}");
    let out = cluster.kubectl(&["exec", "client", "--", "sh", "-c", "echo out; echo err >&2; exit 0"])?;
    assert_eq!(out, "out\n");
    let failed = cluster.kubectl_fails(&["exec", "client", "--", "sh", "-c", "exit 3"])?;
    assert!(failed.contains("exit code 3"), "{failed}");
    let crash = "apiVersion: v1
kind: Pod
metadata:
  name: crash
spec:
  containers:
  - name: main
    image: busybox
    command: [\"sh\", \"-c\", \"echo attempt; exit 1\"]
";
    cluster.apply(crash)?;
    eventually(cluster, &["get", "pod", "crash"], |row| row.contains("CrashLoopBackOff"))?;
    assert_eq!(cluster.kubectl(&["logs", "crash", "--previous"])?, "attempt\n");
    cluster.kubectl(&["delete", "pod", "crash", "--grace-period=0", "--force"])?;
    Ok(())
}

fn ask(cluster: &Cluster) -> anyhow::Result<()> {
    let explained = cluster.kubectl(&["explain", "deployment.spec.replicas"])?;
    assert!(explained.contains("FIELD: replicas <integer>"), "{explained}");
    let resources = cluster.kubectl(&["api-resources"])?;
    for kind in ["deployments", "networkpolicies", "leases", "poddisruptionbudgets"] {
        assert!(resources.contains(kind), "{kind} in {resources}");
    }
    let events = cluster.kubectl(&["get", "events"])?;
    assert!(events.starts_with("LAST SEEN   TYPE"), "{events}");
    assert_eq!(cluster.kubectl(&["auth", "can-i", "create", "pods"])?, "yes\n");
    let denied = cluster.kubectl_fails(&[
        "auth",
        "can-i",
        "create",
        "pods",
        "--as=system:serviceaccount:default:default",
    ]);
    assert!(denied.is_ok(), "a service account without a role may not create pods");
    let token = cluster.kubectl(&["create", "token", "default"])?;
    assert_eq!(token.trim().split('.').count(), 3, "a signed token has three parts");
    let ready = cluster.kubectl(&["get", "--raw", "/readyz?verbose"])?;
    assert!(ready.contains("[+]ping ok") && ready.contains("readyz check passed"), "{ready}");
    Ok(())
}

fn bad_input(cluster: &Cluster) -> anyhow::Result<()> {
    let rows = [
        (
            "kind: Pod\napiVersion: v1\nmetadata:\n  name: x\nspec:\n  contaners: []\n",
            "unknown field \"spec.contaners\"",
        ),
        ("kind: Pod\napiVersion: v1\nmetadata: {}\nspec:\n  containers: [{name: a, image: b}]\n", "name"),
        ("kind: Nothing\napiVersion: v1\nmetadata:\n  name: x\n", "no matches for kind \"Nothing\""),
        (
            "kind: ConfigMap\napiVersion: v1\nmetadata:\n  name: x\n  labels:\n    a: \"b c\"\n",
            "a valid label must be",
        ),
        (
            "kind: Deployment\napiVersion: apps/v1\nmetadata:\n  name: x\nspec:\n  selector:\n    matchLabels: {a: b}\n  \
             template:\n    metadata:\n      labels: {a: c}\n    spec:\n      containers: [{name: a, image: b}]\n",
            "`selector` does not match template `labels`",
        ),
    ];
    let before = cluster.kubectl(&["get", "pods,configmaps,deployments", "-o", "name"])?;
    for (number, (manifest, expected)) in rows.iter().enumerate() {
        let path = cluster.data_dir().join(format!("bad-{number}.yaml"));
        std::fs::write(&path, manifest)?;
        let said = cluster.kubectl_fails(&["create", "-f", &path.to_string_lossy()])?;
        assert!(said.contains(expected), "{expected} in {said}");
    }
    assert_eq!(cluster.kubectl(&["get", "pods,configmaps,deployments", "-o", "name"])?, before);
    Ok(())
}

fn delete(cluster: &Cluster) -> anyhow::Result<()> {
    let none = |left: &str| left.is_empty();
    cluster.kubectl(&["delete", "deployment", "web", "--cascade=foreground", "--timeout=60s"])?;
    let left = ["get", "replicasets,pods", "-l", "app=web", "-o", "name"];
    eventually(cluster, &left, none)?;
    cluster.apply(&nginx("orphan", 1))?;
    cluster.kubectl(&["rollout", "status", "deployment/orphan", "--timeout=60s"])?;
    cluster.kubectl(&["delete", "deployment", "orphan", "--cascade=orphan"])?;
    let sets = cluster.kubectl(&["get", "replicasets", "-l", "app=orphan", "-o", "name"])?;
    assert_eq!(sets.lines().count(), 1, "an orphaned ReplicaSet stays");
    cluster.kubectl(&["delete", "replicaset", "-l", "app=orphan"])?;
    eventually(cluster, &["get", "pods", "-l", "app=orphan", "-o", "name"], none)?;
    Ok(())
}
