//! Containers, images and pod sandboxes of one node: the `Runtime` that the kubelet drives, in CRI's terms.
//!
//! The built-in runtime keeps one `weft-init` process per sandbox, which owns its containers, logs and exit codes;
//! the agent may die and come back at any time and finds everything again by `list`.

pub mod builtin;
mod chain;
mod cni;
pub mod folders;
pub mod images;

pub use chain::chain;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a sandbox is made from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// Pod's name.
    pub name: String,
    /// Pod's namespace.
    pub namespace: String,
    /// Pod's uid.
    pub uid: String,
    /// How many sandboxes this pod had before on this node.
    pub attempt: u32,
    /// Host name within the pod (ignored with `host_network`).
    pub hostname: String,
    /// Whole content of resolv.conf for the containers; empty for none.
    pub resolv_conf: String,
    /// Use the node's network namespace; no CNI call.
    pub host_network: bool,
    /// Use the node's PID namespace.
    pub host_pid: bool,
    /// Use the node's IPC namespace.
    pub host_ipc: bool,
    /// Sysctls of the pod's namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// Folder for the containers' logs (`/var/log/pods/<ns>_<name>_<uid>`).
    pub log_directory: PathBuf,
    /// Cgroup below the node's root cgroup, without leading slash: `burstable/pod<uid>`.
    pub cgroup: String,
    /// Limits of the whole pod.
    pub resources: Resources,
    /// Labels to find it by.
    pub labels: BTreeMap<String, String>,
    /// Annotations passed through.
    pub annotations: BTreeMap<String, String>,
    /// Ports of the node that lead to the pod (ignored with `host_network`).
    #[serde(default)]
    pub port_mappings: Vec<PortMapping>,
    /// Bounds on the pod's traffic (ignored with `host_network`).
    #[serde(default)]
    pub bandwidth: Bandwidth,
}

/// A port of the node that leads to a pod; as CNI's capability `portMappings` has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The node's port.
    pub host_port: u16,
    /// The pod's.
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// The node's address; empty for every one.
    #[serde(rename = "hostIP")]
    pub host_ip: String,
}

/// Bounds on a pod's traffic, as the pod sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// What it receives.
    pub ingress_bits_per_second: Option<u64>,
    /// What it sends.
    pub egress_bits_per_second: Option<u64>,
}

/// Limits of a container or pod, as the kubelet computed them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// CPU weight on the cgroup-v1 scale (2 to 262144).
    pub cpu_shares: Option<u64>,
    /// CFS quota in microseconds per period.
    pub cpu_quota_us: Option<i64>,
    /// CFS period in microseconds.
    pub cpu_period_us: Option<u64>,
    /// Memory limit in bytes.
    pub memory_limit_bytes: Option<i64>,
    /// Limit on the number of tasks.
    pub pids_limit: Option<i64>,
    /// Adjustment of the OOM score; a refusal by the kernel is no error.
    pub oom_score_adj: Option<i32>,
}

/// A mount from the node into a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Path on the node; file or folder.
    pub host_path: PathBuf,
    /// Absolute path in the container.
    pub container_path: PathBuf,
    /// Mount read-only.
    pub read_only: bool,
    /// `rprivate`, `rslave` or `rshared`.
    pub propagation: Propagation,
}

/// Mount propagation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    /// Nothing is propagated.
    #[default]
    Private,
    /// From the node to the container.
    HostToContainer,
    /// Both ways.
    Bidirectional,
}

/// What a container is made from. Image defaults (entrypoint, environment, user, working folder) are merged in by the runtime.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Container's name in the pod.
    pub name: String,
    /// Restart count: the number of this attempt.
    pub attempt: u32,
    /// Image reference as resolved by `image_status`.
    pub image: String,
    /// Replaces the image's entrypoint unless empty.
    pub command: Vec<String>,
    /// Replaces the image's arguments unless empty (and drops them if `command` is set).
    pub args: Vec<String>,
    /// Working folder; empty for the image's.
    pub working_dir: String,
    /// Environment over the image's.
    pub env: Vec<(String, String)>,
    /// Mounts in the order given.
    pub mounts: Vec<Mount>,
    /// Limits.
    pub resources: Resources,
    /// User, capabilities and the like.
    pub security: Security,
    /// Give it a terminal.
    pub tty: bool,
    /// Keep its standard input open.
    pub stdin: bool,
    /// Log file relative to the sandbox's log folder: `<name>/<attempt>.log`.
    pub log_path: PathBuf,
    /// Labels to find it by.
    pub labels: BTreeMap<String, String>,
    /// Annotations passed through.
    pub annotations: BTreeMap<String, String>,
}

/// The security context of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Security {
    /// User id; `None` takes the image's user (a name is looked up in the image's /etc/passwd).
    pub run_as_user: Option<u32>,
    /// Group id; `None` takes the user's primary group.
    pub run_as_group: Option<u32>,
    /// More groups.
    pub supplemental_groups: Vec<u32>,
    /// Refuse to start as root.
    pub run_as_non_root: bool,
    /// All capabilities, devices and no masked paths.
    pub privileged: bool,
    /// Capabilities added to the default set (`NET_ADMIN`, `ALL`).
    pub add_capabilities: Vec<String>,
    /// Capabilities taken from the default set.
    pub drop_capabilities: Vec<String>,
    /// Root file system read-only.
    pub read_only_root: bool,
    /// Set no_new_privs.
    pub no_new_privileges: bool,
    /// Use the runtime's default seccomp profile.
    pub seccomp_default: bool,
}

/// A container's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    /// Made, not started.
    Created,
    /// Running since a time (nanoseconds since the epoch).
    Running {
        /// Start time, ns since the epoch.
        started_at_ns: i64,
    },
    /// Ended.
    Exited(Exit),
}

/// How a container ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code; 128 + signal if it was killed by one.
    pub code: i32,
    /// Start time, ns since the epoch.
    pub started_at_ns: i64,
    /// End time, ns since the epoch.
    pub finished_at_ns: i64,
    /// The kernel killed it for lack of memory.
    pub oom_killed: bool,
    /// Why it could not be started at all, if so.
    pub message: String,
}

/// A container as found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Id: 64 hexadecimal digits.
    pub id: String,
    /// Its sandbox.
    pub sandbox_id: String,
    /// What it was made from.
    pub spec: ContainerSpec,
    /// Digest of the image: `sha256:…`.
    pub image_id: String,
    /// Its state.
    pub state: ContainerState,
    /// Creation time, ns since the epoch.
    pub created_at_ns: i64,
}

/// A sandbox as found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Id: 64 hexadecimal digits.
    pub id: String,
    /// What it was made from.
    pub spec: SandboxSpec,
    /// Whether its init is alive.
    pub ready: bool,
    /// Addresses that CNI gave it; empty with the host's network.
    pub ips: Vec<IpAddr>,
    /// Creation time, ns since the epoch.
    pub created_at_ns: i64,
}

/// An image on the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Digest of its configuration: `sha256:…`.
    pub id: String,
    /// References: `docker.io/library/nginx:1.22`.
    pub tags: Vec<String>,
    /// Bytes of its unpacked layers.
    pub size_bytes: u64,
    /// User of its configuration, if any.
    pub user: String,
}

/// An event of the runtime, pushed as it happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuntimeEvent {
    /// A container ended.
    ContainerExited {
        /// Pod's uid.
        pod_uid: String,
        /// Container id.
        container_id: String,
    },
    /// A sandbox's init died.
    SandboxDied {
        /// Pod's uid.
        pod_uid: String,
        /// Sandbox id.
        sandbox_id: String,
    },
}

/// Standard streams for an exec or attach; what is `None` is closed.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Read end handed to the process as standard input.
    pub stdin: Option<OwnedFd>,
    /// Write end handed to the process as standard output.
    pub stdout: Option<OwnedFd>,
    /// Write end handed to the process as standard error.
    pub stderr: Option<OwnedFd>,
    /// The other end of a pseudo terminal, instead of the three; the process gets a session with it.
    pub tty: Option<OwnedFd>,
}

/// Why the runtime could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such sandbox, container or image.
    #[error("{what} {id:?} not found")]
    NotFound {
        /// `sandbox`, `container` or `image`.
        what: &'static str,
        /// Its id or reference.
        id: String,
    },
    /// The request can't be carried out as it stands.
    #[error("{what}: {reason}")]
    Invalid {
        /// What was being done.
        what: &'static str,
        /// Why it can't be.
        reason: String,
    },
    /// The container's program could not be started (upstream's reason `StartError`, or `RunContainerError`).
    #[error("failed to start container {name:?}: {reason}")]
    Start {
        /// Container's name.
        name: String,
        /// What the kernel or the image said.
        reason: String,
    },
    /// The network plugin refused.
    #[error("network plugin: {0}")]
    Network(String),
    /// An operation of the kernel failed.
    #[error("cannot {op} {path:?}")]
    Io {
        /// What was being done.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The time given ran out.
    #[error("{what} did not end within {seconds} s")]
    Timeout {
        /// What.
        what: &'static str,
        /// The bound.
        seconds: u64,
    },
}

/// The runtime of a node, in CRI's terms. Every call may be repeated after a crash of the agent.
#[async_trait::async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Makes a sandbox with its namespaces, cgroup and network. On failure nothing is left.
    async fn run_sandbox(&self, spec: SandboxSpec) -> Result<Sandbox, Error>;
    /// Ends a sandbox: kills its containers, CNI DEL, init. Succeeds on one that is gone.
    async fn stop_sandbox(&self, sandbox_id: &str) -> Result<(), Error>;
    /// Removes a stopped sandbox and its containers' records (not their logs). Succeeds on one that is gone.
    async fn remove_sandbox(&self, sandbox_id: &str) -> Result<(), Error>;
    /// All sandboxes of the node.
    async fn list_sandboxes(&self) -> Result<Vec<Sandbox>, Error>;
    /// Makes a container's root and record; returns its id.
    async fn create_container(&self, sandbox_id: &str, spec: ContainerSpec) -> Result<String, Error>;
    /// Starts a made container.
    async fn start_container(&self, container_id: &str) -> Result<(), Error>;
    /// SIGTERM (or the image's stop signal), then SIGKILL after `grace`. Returns when it has ended.
    async fn stop_container(&self, container_id: &str, grace: std::time::Duration) -> Result<(), Error>;
    /// Removes an ended container's record and root (not its log). Succeeds on one that is gone.
    async fn remove_container(&self, container_id: &str) -> Result<(), Error>;
    /// All containers of the node.
    async fn list_containers(&self) -> Result<Vec<Container>, Error>;
    /// One container.
    async fn container(&self, container_id: &str) -> Result<Container, Error>;
    /// Runs a command in a running container with the given streams; returns its exit code.
    async fn exec(&self, container_id: &str, command: Vec<String>, stdio: Stdio) -> Result<i32, Error>;
    /// The image behind a reference (normalised: `nginx` is `docker.io/library/nginx:latest`) or id.
    async fn image_status(&self, reference: &str) -> Result<Option<Image>, Error>;
    /// All images.
    async fn list_images(&self) -> Result<Vec<Image>, Error>;
    /// Events from now on. Bounded; a reader that falls behind gets `Lagged` and lists again.
    fn events(&self) -> tokio::sync::broadcast::Receiver<RuntimeEvent>;
    /// Path to a container's log file.
    async fn log_path(&self, container_id: &str) -> Result<PathBuf, Error>;
    /// Pid of the process that holds the sandbox's namespaces, for the probes and port-forward.
    async fn sandbox_pid(&self, sandbox_id: &str) -> Result<i32, Error>;
}
