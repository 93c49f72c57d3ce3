//! What the end-to-end tests share: a cluster with the sample images, and manifests.

pub mod churn;
pub mod machine;
pub mod traffic;
pub mod writes;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use nix::unistd::Pid;
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::{require, wait_until};

/// What every end-to-end test needs.
pub const NEEDS: &[&str] = &["root", "bpf", "kubectl", "weft"];

/// A cluster with the sample images, or `None` where it can't be had (a counted skip).
///
/// # Errors
/// If it doesn't start.
pub fn cluster(test: &str, label: &str, flags: &[&str]) -> anyhow::Result<Option<Cluster>> {
    if !require(test, NEEDS) {
        return Ok(None);
    }
    let cluster = Cluster::start(label, flags)?;
    for image in ["busybox", "nginx"] {
        cluster.import(&image_archive(image)?)?;
    }
    Ok(Some(cluster))
}

/// The archive of a sample image.
///
/// # Errors
/// If `cargo xtask images` hasn't made it.
pub fn image_archive(name: &str) -> anyhow::Result<PathBuf> {
    let folder = std::env::var_os("WEFT_IMAGES")
        .map_or_else(|| weft_tests_harness::workspace().join("target").join("images"), PathBuf::from);
    let path = folder.join(format!("{name}.tar"));
    anyhow::ensure!(path.is_file(), "no {}; run `cargo xtask images`", path.display());
    Ok(path)
}

/// An nginx Deployment.
pub fn nginx(name: &str, replicas: u32) -> String {
    format!(
        "apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
spec:
  replicas: {replicas}
  selector:
    matchLabels:
      app: {name}
  template:
    metadata:
      labels:
        app: {name}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: nginx
        image: nginx:1.22
        ports:
        - containerPort: 80
        readinessProbe:
          httpGet:
            path: /
            port: 80
          periodSeconds: 1
        lifecycle:
          preStop:
            sleep:
              seconds: 2
"
    )
}

/// The node port of [`WEB`].
pub const NODE_PORT: u16 = 30_080;
/// A Service for the pods of `nginx("web", …)`.
pub const WEB: &str = "apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, nodePort: 30080}]
";

/// A busybox pod that sleeps.
pub fn sleeper(name: &str, node: Option<&str>) -> String {
    let node = node.map(|node| format!("  nodeName: {node}\n")).unwrap_or_default();
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
spec:
{node}  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: busybox
    command: [\"sleep\", \"100000\"]
"
    )
}

/// Waits until `kubectl` with these arguments prints what `accept` takes.
///
/// # Errors
/// After a minute.
pub fn eventually(cluster: &Cluster, args: &[&str], accept: impl Fn(&str) -> bool) -> anyhow::Result<String> {
    let mut last = String::new();
    let waited = wait_until(&format!("kubectl {}", args.join(" ")), Duration::from_secs(60), || {
        last = cluster.kubectl(args)?;
        Ok(accept(&last).then(|| last.clone()))
    });
    waited.with_context(|| format!("the last answer was:\n{last}"))
}

/// Has a pod ask a server on the machine that the nodes are on, at one of its addresses. Returns who the server sees.
///
/// # Errors
/// If the pod gets no answer.
pub fn seen_outside(cluster: &Cluster, pod: &str, listen: IpAddr) -> anyhow::Result<IpAddr> {
    let (tell, port) = std::sync::mpsc::channel();
    let outside = cluster.netns.thread(move || {
        let listener = TcpListener::bind((listen, 0))?;
        tell.send(listener.local_addr()?.port())?;
        let (mut stream, from) = listener.accept()?;
        // Whole, or the kernel would answer the rest with a reset.
        let mut request = BufReader::new(&stream).lines();
        while request.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfrom outside\n")?;
        Ok(from.ip())
    })?;
    let url = format!("http://{}/", SocketAddr::new(listen, port.recv()?));
    let said = cluster.kubectl(&["exec", pod, "--", "wget", "-qO-", &url])?;
    anyhow::ensure!(said.trim() == "from outside", "{said}");
    outside.join().map_err(|_panic| anyhow::anyhow!("the server outside broke down"))?
}

/// The agent of a node, found by its command line.
///
/// # Errors
/// If none runs.
pub fn agent_of(cluster: &Cluster, node: &str) -> anyhow::Result<Pid> {
    let data = cluster.data_dir().to_string_lossy().into_owned();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let command = std::fs::read_to_string(path.join("cmdline")).unwrap_or_default();
        let words: Vec<&str> = command.split('\0').collect();
        if words.contains(&data.as_str()) && words.contains(&"agent") && words.contains(&node) {
            let pid = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            return pid.map(Pid::from_raw).context("a process' folder is named by a number");
        }
    }
    anyhow::bail!("no agent of {node} runs")
}
