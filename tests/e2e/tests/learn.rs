//! `weft policy learn`: policies proposed from traffic let the same traffic pass, and nothing else.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_tests_e2e::{cluster, nginx};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);

/// Clients of their own labels, in the namespace and in another, and what is asked.
const WORKLOAD: &str = "apiVersion: v1
kind: Namespace
metadata: {name: away}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: other}
spec: {selector: {app: other}, ports: [{port: 80}]}
";

fn client(namespace: &str, name: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{{name: main, image: busybox, command: [sleep, \"100000\"]}}]
"
    )
}

#[test]
fn what_was_seen_goes_on_and_nothing_else() -> anyhow::Result<()> {
    let Some(mut cluster) =
        cluster("learn::what_was_seen_goes_on_and_nothing_else", "learn", &["--nodes", "2"])?
    else {
        return Ok(());
    };
    let pods = [("default", "client"), ("default", "stranger"), ("away", "guest")];
    let clients: String = pods.iter().map(|(namespace, name)| client(namespace, name)).collect();
    cluster.apply(&[WORKLOAD, &clients].concat())?;
    cluster.apply(&format!("{}---\n{}", nginx("web", 2), nginx("other", 1)))?;
    for deployment in ["deployment/web", "deployment/other"] {
        cluster.kubectl(&["rollout", "status", deployment, "--timeout=60s"])?;
    }
    for (namespace, name) in pods {
        let pod = format!("pod/{name}");
        cluster.kubectl(&["wait", "-n", namespace, &pod, "--for=condition=Ready", "--timeout=60s"])?;
    }
    let proposed = learn(&cluster)?;
    for part in ["learned-client", "learned-web", "kubernetes.io/metadata.name: away", "10.43.0.10/32"] {
        ensure!(proposed.contains(part), "{part} is not in:\n{proposed}");
    }
    ensure!(!proposed.contains("pod-template-hash") && !proposed.contains("stranger"), "{proposed}");
    let left = cluster.kubectl(&["get", "networkpolicies", "-A", "-o", "name"])?;
    ensure!(left.is_empty(), "it left {left}");

    cluster.apply(&proposed)?;
    refused(&cluster, "default", "stranger", "http://web")?;
    refused(&cluster, "default", "client", "http://other")?;
    for _ in 0..3 {
        // By name: DNS goes on too.
        asks(&cluster, "default", "client", "http://web")?;
        asks(&cluster, "away", "guest", "http://web.default")?;
    }
    // Nothing was seen of it, so nothing is proposed, and it is as free as before.
    asks(&cluster, "default", "stranger", "http://other")?;
    cluster.purge()
}

/// Learns while the two clients ask, on every node that a backend may be on.
fn learn(cluster: &Cluster) -> anyhow::Result<String> {
    let mut learning = cluster
        .weft()?
        .args(["policy", "learn", "-n", "default", "--duration", "15s"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // It says so within seconds, or ends.
    let mut errors = BufReader::new(learning.stderr.take().context("a pipe")?);
    let mut said = String::new();
    errors.read_line(&mut said)?;
    if !said.starts_with("watching ") {
        learning.kill()?;
        anyhow::bail!("it said {said}");
    }
    for _ in 0..5 {
        asks(cluster, "default", "client", "http://web")?;
        asks(cluster, "away", "guest", "http://web.default")?;
    }
    let output = ended(learning)?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

fn ended(mut child: Child) -> anyhow::Result<Output> {
    let status = wait_until("it ends", PATIENCE, || Ok(child.try_wait()?));
    if status.is_err() {
        child.kill()?;
    }
    status?;
    Ok(child.wait_with_output()?)
}

fn asks(cluster: &Cluster, namespace: &str, pod: &str, url: &str) -> anyhow::Result<()> {
    let said =
        cluster.kubectl(&["exec", "-n", namespace, pod, "--", "timeout", "10", "wget", "-qO-", url])?;
    ensure!(said.contains("nginx") || said.contains("html"), "{said}");
    Ok(())
}

/// Waits until a policy keeps a pod from a Service.
fn refused(cluster: &Cluster, namespace: &str, pod: &str, url: &str) -> anyhow::Result<()> {
    wait_until(&format!("{pod} is kept from {url}"), PATIENCE, || {
        let args = ["exec", "-n", namespace, pod, "--", "timeout", "3", "wget", "-qO-", url];
        Ok(cluster.kubectl(&args).is_err().then_some(()))
    })
}
