//! A machine beside a cluster's node, with network of its own: what runs there reaches pods and the API by their addresses, and no Service
//! but by a proxy.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::{Netns, command_in, ip};

const PATIENCE: Duration = Duration::from_secs(30);

/// The service account that a proxy needs, and the rest of the manifest.
pub const ACCOUNT: &str = include_str!("../../../docs/samples/proxy.yaml");

/// The machine's name as a node.
pub const NAME: &str = "stranger";

/// The machine's address.
pub const ADDRESS: &str = "10.77.0.2";

/// A network namespace, a folder and a cgroup.
#[derive(Debug)]
pub struct Machine {
    /// Its network.
    pub netns: Netns,
    folder: tempfile::TempDir,
    cgroup: String,
}

impl Machine {
    /// Makes it, linked to the cluster's node.
    ///
    /// # Errors
    /// If the namespaces or their link can't be made.
    pub fn new(cluster: &Cluster) -> anyhow::Result<Self> {
        let netns = Netns::new("prx")?;
        let node = cluster.netns.name();
        ip(&[
            "-n",
            node,
            "link",
            "add",
            "to-prx",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            netns.name(),
        ])?;
        ip(&["-n", node, "addr", "add", "10.77.0.1/24", "dev", "to-prx"])?;
        ip(&["-n", node, "link", "set", "to-prx", "up"])?;
        ip(&["-n", netns.name(), "addr", "add", &format!("{ADDRESS}/24"), "dev", "eth0"])?;
        ip(&["-n", netns.name(), "link", "set", "eth0", "up"])?;
        ip(&["-n", netns.name(), "route", "add", "default", "via", "10.77.0.1"])?;
        let folder = tempfile::tempdir()?;
        Ok(Self { netns, folder, cgroup: format!("/weft-proxy-{}", std::process::id()) })
    }

    /// For files of the test's.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The cgroup of the processes that weft's proxy serves.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// Where weft's proxy pins.
    pub fn pins(&self) -> PathBuf {
        self.folder.path().join("bpf")
    }

    /// `weft proxy` with further flags.
    ///
    /// # Errors
    /// If there is no binary or namespace.
    pub fn weft_proxy(&self, cluster: &Cluster, more: &[&str]) -> anyhow::Result<Command> {
        let mut command = command_in(&self.netns.path(), cluster.weft()?.get_program())?;
        command.args(["proxy", "--hostname-override", NAME, "--cgroup", &self.cgroup]);
        command.arg("--kubeconfig").arg(self.kubeconfig()).arg("--pin-dir").arg(self.pins()).args(more);
        Ok(command)
    }

    /// Starts `weft proxy` in place of kube-proxy.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start_weft_proxy(&self, cluster: &Cluster, log: &Path) -> anyhow::Result<Running> {
        Running::start(self.weft_proxy(cluster, &["--cleanup-kube-proxy"])?, log)
    }

    /// Runs a program to its end and answers what it wrote.
    ///
    /// # Errors
    /// If it fails, with what it said.
    pub fn run(&self, program: &str, args: &[&str]) -> anyhow::Result<String> {
        let output = self.netns.command(program)?.args(args).output().with_context(|| program.to_owned())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {}: {}", args.join(" "), said.trim());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Asks a proxy's own server.
    ///
    /// # Errors
    /// If it doesn't answer with 200.
    pub fn get(&self, port: u16, path: &str) -> anyhow::Result<String> {
        let request = format!("GET /{path} HTTP/1.0\r\n\r\n");
        let asked = self.netns.thread(move || {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            ensure!(answer.contains(" 200 OK"), "{answer}");
            Ok(answer)
        })?;
        asked.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))?
    }

    /// The kubeconfig of the sample's service account.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// Makes that kubeconfig.
    ///
    /// # Errors
    /// If the cluster has no such account.
    pub fn write_kubeconfig(&self, cluster: &Cluster) -> anyhow::Result<()> {
        let token = cluster.kubectl(&["create", "token", "weft-proxy", "-n", "kube-system"])?;
        let path = "jsonpath={.clusters[0].cluster.certificate-authority-data}";
        let authority = cluster.kubectl(&["config", "view", "--raw", "-o", path])?;
        let text = format!(
            "apiVersion: v1
kind: Config
clusters:
- name: c
  cluster: {{server: \"https://10.77.0.1:6443\", tls-server-name: kubernetes, certificate-authority-data: {authority}}}
users:
- name: u
  user: {{token: {token}}}
contexts:
- name: c
  context: {{cluster: c, user: u}}
current-context: c
"
        );
        Ok(std::fs::write(self.kubeconfig(), text)?)
    }
}

/// What was started is ended whatever happens.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// Starts a command whose output goes to a file.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start(mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let log = File::create(log)?;
        let program = command.get_program().to_owned();
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(Self(command.spawn().with_context(|| format!("start {}", program.display()))?))
    }

    /// Whether it has not ended.
    ///
    /// # Errors
    /// If that can't be told.
    pub fn runs(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }

    /// Kills it.
    ///
    /// # Errors
    /// If it can't be killed.
    pub fn end(&mut self) -> anyhow::Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
