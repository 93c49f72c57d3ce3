//! The session of any Kubernetes primer, with the real kubectl, the Python client and kube.

use std::process::Stdio;

use weft_tests_e2e::{cluster, eventually, nginx, sleeper};
use weft_tests_harness::cluster::Cluster;

/// One cluster for the whole session: a primer's steps build on each other.
#[test]
fn primer() -> anyhow::Result<()> {
    let Some(mut cluster) = cluster("session::primer", "primer", &[])? else { return Ok(()) };
    create_and_look(&cluster)?;
    watch(&cluster)?;
    roll(&cluster)?;
    change(&cluster)?;
    logs_and_exec(&cluster)?;
    follow_and_terminal(&cluster)?;
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
    let phases =
        cluster.kubectl(&["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].status.phase}"])?;
    assert_eq!(phases, "Running Running");
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

/// Reads lines of a command that doesn't end by itself, until `enough` says so; then ends it.
fn lines_until(
    cluster: &Cluster,
    args: &[&str],
    mut enough: impl FnMut(&[String]) -> anyhow::Result<bool>,
) -> anyhow::Result<Vec<String>> {
    use std::io::BufRead as _;
    // Its own limit, so that a line that never comes fails the test instead of hanging it.
    let mut command = cluster.netns.command("timeout")?;
    command.args(["60", "kubectl"]).args(args).env("KUBECONFIG", cluster.kubeconfig());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().expect("standard output is a pipe");
    let mut lines = Vec::new();
    for line in std::io::BufReader::new(output).lines() {
        lines.push(line?);
        if enough(&lines)? {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(child.id().cast_signed()),
                nix::sys::signal::SIGTERM,
            )?;
            child.wait()?;
            return Ok(lines);
        }
    }
    anyhow::bail!("kubectl {} ended with {}: {lines:?}", args.join(" "), child.wait()?)
}

fn watch(cluster: &Cluster) -> anyhow::Result<()> {
    let manifest = cluster.data_dir().join("watched.yaml");
    std::fs::write(
        &manifest,
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: watched, labels: {seen: \"yes\"}}\n",
    )?;
    let made = cluster.kubectl(&["create", "-f", &manifest.to_string_lossy()])?;
    assert_eq!(made, "configmap/watched created\n");
    let lines = lines_until(cluster, &["get", "configmaps", "-l", "seen=yes", "-w"], |lines| {
        let count = lines.len();
        anyhow::ensure!(count < 10, "too many events: {lines:?}");
        if count == 2 {
            cluster.kubectl(&["patch", "configmap", "watched", "-p", r#"{"data":{"a":"1"}}"#])?;
        }
        Ok(count == 3)
    });
    let lines = lines?;
    assert!(lines[0].starts_with("NAME"), "{lines:?}");
    assert_eq!(lines[1].split_whitespace().take(2).collect::<Vec<_>>(), ["watched", "0"]);
    assert_eq!(lines[2].split_whitespace().take(2).collect::<Vec<_>>(), ["watched", "1"]);
    cluster.kubectl(&["delete", "configmap", "watched"])?;
    Ok(())
}

fn roll(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.kubectl(&["set", "env", "deployment/web", "COLOUR=green"])?;
    let status = cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    assert!(status.contains("deployment \"web\" successfully rolled out"), "{status}");
    let history = cluster.kubectl(&["rollout", "history", "deployment/web"])?;
    assert!(history.contains("\n1 ") && history.contains("\n2 "), "{history}");
    let second = cluster.kubectl(&["rollout", "history", "deployment/web", "--revision=2"])?;
    assert!(second.contains("COLOUR:\tgreen"), "{second}");
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
    // What is secret never gets to the node's disk.
    let token = " /var/run/secrets/kubernetes.io/serviceaccount ";
    let mounts = cluster.kubectl(&["exec", "client", "--", "cat", "/proc/mounts"])?;
    let of_token = mounts.lines().find(|line| line.contains(token)).unwrap_or(&mounts);
    assert!(of_token.starts_with("tmpfs "), "{of_token}");
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

fn follow_and_terminal(cluster: &Cluster) -> anyhow::Result<()> {
    let ticker = "apiVersion: v1
kind: Pod
metadata:
  name: ticker
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: one
    image: busybox
    command: [\"sh\", \"-c\", \"i=0; while true; do i=$((i+1)); echo one $i; sleep 0.1; done\"]
  - name: two
    image: busybox
    command: [\"sh\", \"-c\", \"echo two; sleep 100000\"]
";
    cluster.apply(ticker)?;
    cluster.kubectl(&["wait", "pod/ticker", "--for=condition=Ready", "--timeout=60s"])?;
    let lines = lines_until(cluster, &["logs", "-f", "ticker", "-c", "one"], |lines| Ok(lines.len() == 20))?;
    let expected: Vec<String> = (1..=20).map(|number| format!("one {number}")).collect();
    assert_eq!(lines, expected, "every line once, in order");
    eventually(cluster, &["logs", "ticker", "-c", "two"], |log| log == "two\n")?;
    assert_eq!(cluster.kubectl(&["logs", "ticker", "-c", "one", "--tail=2"])?.lines().count(), 2);
    let unnamed = cluster.kubectl_fails(&["logs", "ticker", "-c", "three"])?;
    assert!(unnamed.contains("container three is not valid for pod ticker"), "{unnamed}");
    cluster.kubectl(&["delete", "pod", "ticker", "--wait=false"])?;
    cluster.kubectl(&["wait", "pod/ticker", "--for=delete", "--timeout=60s"])?;

    // `script` gives kubectl a terminal; what the shell in the pod says of its own is the proof.
    let inner = "kubectl exec -it client -- sh -c 'test -t 0 && test -t 1 && echo terminal $(stty size); read word; echo got $word'";
    let mut command = cluster.netns.command("script")?;
    command.args(["-qec", &format!("stty rows 33 cols 77; {inner}"), "/dev/null"]);
    command.env("KUBECONFIG", cluster.kubeconfig()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    // Held open to the end: its end would be the terminal's.
    let mut input = child.stdin.take().expect("standard input is a pipe");
    std::io::Write::write_all(&mut input, b"hello\n")?;
    let output = child.wait_with_output()?;
    drop(input);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("terminal 33 77") && said.contains("got hello"), "{said}");
    assert!(output.status.success(), "{}", output.status);
    Ok(())
}

fn ask(cluster: &Cluster) -> anyhow::Result<()> {
    let explained = cluster.kubectl(&["explain", "deployment.spec.replicas"])?;
    assert!(explained.contains("FIELD: replicas <integer>"), "{explained}");
    let explained = cluster.kubectl(&["explain", "pod.spec.containers"])?;
    for part in [
        "List of containers belonging to the pod.",
        "A single application container",
        "imagePullPolicy\t<string>",
    ] {
        assert!(explained.contains(part), "{part} in {explained}");
    }
    let resources = cluster.kubectl(&["api-resources"])?;
    for kind in ["deployments", "networkpolicies", "leases", "poddisruptionbudgets"] {
        assert!(resources.contains(kind), "{kind} in {resources}");
    }
    let events = cluster.kubectl(&["get", "events"])?;
    assert!(events.starts_with("LAST SEEN   TYPE"), "{events}");
    assert_eq!(cluster.kubectl(&["auth", "can-i", "create", "pods"])?, "yes\n");
    let account = "--as=system:serviceaccount:default:default";
    let denied = cluster.kubectl_command(&["auth", "can-i", "create", "pods", account])?.output()?;
    assert_eq!((denied.stdout.as_slice(), denied.status.code()), (b"no\n".as_slice(), Some(1)));
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
    // Unknown to the server, so there is nothing to validate it by.
    let path = cluster.data_dir().join("bad-kind.yaml");
    std::fs::write(&path, "kind: Nothing\napiVersion: v1\nmetadata:\n  name: x\n")?;
    let said = cluster.kubectl_fails(&["create", "--validate=ignore", "-f", &path.to_string_lossy()])?;
    assert!(said.contains("no matches for kind \"Nothing\" in version \"v1\""), "{said}");
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
    let said = cluster.kubectl(&["delete", "replicaset", "-l", "app=orphan", "--cascade=background"])?;
    assert!(said.ends_with("deleted\n") || said.contains("deleted from default namespace"), "{said}");
    eventually(cluster, &["get", "pods", "-l", "app=orphan", "-o", "name"], none)?;
    Ok(())
}
