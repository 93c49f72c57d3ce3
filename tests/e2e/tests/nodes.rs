//! Three nodes on one machine: the overlay, names across nodes, and the loss of a node.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use weft_tests_e2e::{agent_of, cluster, eventually, image_archive};
use weft_tests_harness::cluster::Cluster;

/// A database on one node, its client on another, and a Deployment over all of them.
const WORKLOAD: &str = "apiVersion: v1
kind: Pod
metadata: {name: db, labels: {app: db}}
spec:
  nodeName: node-2
  terminationGracePeriodSeconds: 1
  containers:
  - name: db
    image: postgres:15
    readinessProbe: {exec: {command: [pg_isready, -U, postgres]}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {selector: {app: db}, ports: [{port: 5432}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node-1
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: postgres:15, command: [sleep, \"100000\"]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 6
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      tolerations:
      - {key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 1}
      - {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 1}
      containers: [{name: nginx, image: \"nginx:1.22\"}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
";

#[test]
fn three_nodes() -> anyhow::Result<()> {
    let flags = ["--nodes", "3", "--node-monitor-grace-period", "12"];
    let Some(mut cluster) = cluster("nodes::three_nodes", "nodes", &flags)? else { return Ok(()) };
    cluster.import(&image_archive("postgres")?)?;
    cluster.apply(WORKLOAD)?;
    cluster.kubectl(&["wait", "pod/db", "pod/client", "--for=condition=Ready", "--timeout=60s"])?;
    cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    spread(&cluster)?;
    database(&cluster)?;
    every_pod_everywhere(&cluster)?;
    loss(&cluster)?;
    cluster.purge()
}

fn spread(cluster: &Cluster) -> anyhow::Result<()> {
    let nodes = cluster.kubectl(&[
        "get",
        "pods",
        "-l",
        "app=web",
        "-o",
        "jsonpath={range .items[*]}{.spec.nodeName}{\"\\n\"}{end}",
    ])?;
    for node in ["node-1", "node-2", "node-3"] {
        assert_eq!(
            nodes.lines().filter(|line| *line == node).count(),
            2,
            "pods are spread over the nodes: {nodes}"
        );
    }
    Ok(())
}

/// A megabyte each way through the Service's name, over the overlay.
fn database(cluster: &Cluster) -> anyhow::Result<()> {
    let sql = "create table blob (body text); insert into blob values (repeat('x', 1048576)); \
               select length(body), md5(body) from blob";
    let psql = ["exec", "client", "--", "psql", "-h", "db", "-U", "postgres", "-At", "-c", sql];
    let said = eventually(cluster, &psql, |said| said.contains("1048576"))?;
    assert!(said.contains("1048576|"), "{said}");
    let body = cluster.kubectl(&[
        "exec",
        "client",
        "--",
        "psql",
        "-h",
        "db",
        "-U",
        "postgres",
        "-At",
        "-c",
        "select body from blob",
    ])?;
    assert_eq!(body.trim_end().len(), 1 << 20);
    Ok(())
}

/// From a pod on every node to each pod of the Deployment, and to the Service.
fn every_pod_everywhere(cluster: &Cluster) -> anyhow::Result<()> {
    let pods = cluster.kubectl(&[
        "get",
        "pods",
        "-l",
        "app=web",
        "-o",
        "jsonpath={range .items[*]}{.metadata.name} {.status.podIP}{\"\\n\"}{end}",
    ])?;
    for from in pods.lines().filter_map(|line| line.split(' ').next()) {
        for (name, ip) in pods.lines().filter_map(|line| line.split_once(' ')) {
            let url = format!("http://{ip}/hostname");
            let answer = cluster.kubectl(&["exec", from, "--", "wget", "-qO-", &url])?;
            assert_eq!(answer.trim(), name, "{from} to {ip}");
        }
        let answer = cluster.kubectl(&["exec", from, "--", "wget", "-qO-", "http://web/hostname"])?;
        assert!(pods.contains(answer.trim()), "{from} to the Service: {answer}");
    }
    Ok(())
}

/// A node whose agent is gone for good becomes NotReady, and its pods are replaced elsewhere.
fn loss(cluster: &Cluster) -> anyhow::Result<()> {
    kill(agent_of(cluster, "node-3")?, Signal::SIGTERM)?;
    let begin = Instant::now();
    eventually(cluster, &["get", "node", "node-3"], |row| row.contains("NotReady"))?;
    let replaced = |nodes: &str| {
        let running: Vec<&str> = nodes.lines().filter_map(|line| line.strip_suffix(" ")).collect();
        running.len() == 6 && !running.contains(&"node-3")
    };
    // The deletion time stands behind the node's name; a pod that is being deleted has one.
    let columns = "jsonpath={range .items[*]}{.spec.nodeName} {.metadata.deletionTimestamp}{\"\\n\"}{end}";
    eventually(cluster, &["get", "pods", "-l", "app=web", "-o", columns], replaced)?;
    eventually(cluster, &["get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}"], |n| {
        n == "6"
    })?;
    assert!(
        begin.elapsed() < Duration::from_secs(120),
        "a bound against waiting for ever, not a measurement"
    );
    Ok(())
}
