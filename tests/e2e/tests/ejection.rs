//! A pod that refuses connections while it is Ready: its Service leaves it out, says so, and tries it again.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_tests_e2e::traffic::Clients;
use weft_tests_e2e::{cluster, eventually};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);
const NODE_PORT: u16 = 30_081;
const CONNECTIONS: u64 = 300;
const SERVE: &str = "mkdir -p /www && hostname > /www/hostname &&";

/// Three servers, of which the third doesn't listen; a client; a Service that wants ejection.
fn workload() -> String {
    let pod = |name: &str, app: &str, command: &str| {
        format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{{name: main, image: busybox, command: [sh, -c, \"{command}\"]}}]
---
"
        )
    };
    let listening = format!("{SERVE} exec httpd -f -p 80 -h /www");
    let text = pod("web-1", "web", &listening)
        + &pod("web-2", "web", &listening)
        + &pod("web-3", "web", &format!("{SERVE} exec sleep 100000"))
        + &pod("client", "client", "exec sleep 100000");
    text + "apiVersion: v1
kind: Service
metadata: {name: web, annotations: {weft.dev/ejection: \"true\"}}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, nodePort: 30081}]}
"
}

#[test]
fn a_ready_pod_that_refuses_is_left_out_and_tried_again() -> anyhow::Result<()> {
    let test = "ejection::a_ready_pod_that_refuses_is_left_out_and_tried_again";
    let Some(mut cluster) = cluster(test, "eject", &[])? else { return Ok(()) };
    cluster.apply(&workload())?;
    cluster.kubectl(&["wait", "pod", "--all", "--for=condition=Ready", "--timeout=60s"])?;
    let wait = ["wait", "service/web", "--for=condition=weft.dev/Programmed", "--timeout=60s"];
    cluster.kubectl(&wait)?;
    eventually(
        &cluster,
        &[
            "get",
            "endpointslices",
            "-l",
            "kubernetes.io/service-name=web",
            "-o",
            "jsonpath={.items[*].endpoints[*].conditions.ready}",
        ],
        |ready| ready == "true true true",
    )?;
    let address = cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
    let bad = cluster.kubectl(&["get", "pod", "web-3", "-o", "jsonpath={.status.podIP}"])?;
    let ask = format!("wget -qO- http://{address}/hostname");

    // Sockets of a pod meet it a few times, and then nobody does: not they, and not clients outside.
    let some = format!("for i in $(seq 60); do {ask} 2>&1; done; true");
    let said = cluster.kubectl(&["exec", "client", "--", "sh", "-c", &some])?;
    ensure!(said.contains("refused") && said.contains("web-1"), "{said}");
    event(&cluster, "EndpointEjected", &bad)?;
    let all = format!("for i in $(seq 60); do {ask} || exit 1; done");
    let said = cluster.kubectl(&["exec", "client", "--", "sh", "-c", &all])?;
    ensure!(said.contains("web-1") && said.contains("web-2"), "{said}");
    let tally = ask_from_outside(&cluster)?;
    ensure!(tally == ["web-1", "web-2"], "{tally:?} answered");

    let left_out = format!("{bad}:80");
    for command in [&["service", "show", "web"][..], &["why", "client", "web:80"]] {
        let said = weft(&cluster, command)?;
        ensure!(said.contains(&left_out) && said.contains("is left out: connections to it failed"), "{said}");
    }
    let metrics = metrics(&cluster)?;
    for line in [
        "weft_dataplane_endpoints_left_out{cause=\"ejected\"} 1",
        "weft_dataplane_ejections_total 1",
        "weft_service_connections_total{namespace=\"default\",service=\"web\"} ",
        "weft_service_failures_total{namespace=\"default\",service=\"web\"} ",
    ] {
        ensure!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }

    // It listens at last, and is tried again after its time.
    cluster.kubectl(&["exec", "web-3", "--", "httpd", "-p", "80", "-h", "/www"])?;
    event(&cluster, "EndpointReturned", &bad)?;
    let tally = ask_from_outside(&cluster)?;
    ensure!(tally == ["web-1", "web-2", "web-3"], "{tally:?} answered");
    let said = cluster.kubectl(&["exec", "client", "--", "sh", "-c", &all])?;
    ensure!(said.contains("web-3"), "{said}");
    cluster.purge()
}

/// Asks by the node's port until enough have answered; nobody may fail to.
fn ask_from_outside(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let path = "jsonpath={.items[0].status.addresses[?(@.type==\"InternalIP\")].address}";
    let node: Ipv4Addr = cluster.kubectl(&["get", "node", "-o", path])?.parse()?;
    let to = SocketAddr::from((node, NODE_PORT));
    let clients = Clients::start(&cluster.netns, to, 2, Duration::from_millis(2))?;
    wait_until("the Service answers", PATIENCE, || Ok((clients.answered() >= CONNECTIONS).then_some(())))
        .with_context(|| format!("lost: {:?}", clients.losses()))?;
    let tally = clients.stop()?;
    ensure!(tally.lost.is_empty(), "{:?}", tally.lost);
    Ok(tally.answers.into_keys().collect())
}

/// Waits for an Event on the Service that names the pod.
fn event(cluster: &Cluster, reason: &str, pod: &str) -> anyhow::Result<()> {
    let path = format!(
        "jsonpath={{range .items[?(@.reason==\"{reason}\")]}}{{.involvedObject.kind}}/{{.involvedObject.name}} {{.message}}{{end}}"
    );
    let said = eventually(cluster, &["get", "events", "-o", &path], |said| !said.is_empty())?;
    ensure!(said.starts_with("Service/web ") && said.contains(pod), "{said}");
    Ok(())
}

/// The only node is the test's namespace itself.
fn metrics(cluster: &Cluster) -> anyhow::Result<String> {
    let mut command = cluster.netns.command("curl")?;
    let output = command.args(["-s", "-m", "5", "http://127.0.0.1:10249/metrics"]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn weft(cluster: &Cluster, args: &[&str]) -> anyhow::Result<String> {
    let output = cluster.weft()?.args(args).stdin(Stdio::null()).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
