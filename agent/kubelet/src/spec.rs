//! Builds what the runtime is asked to make: sandbox and container specifications.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod};
use weft_agent_runtime::{ContainerSpec, Error, Mount, Propagation, SandboxSpec, Security};

use crate::config::Config;
use crate::dns;
use crate::env;
use crate::network;
use crate::observed::keys;
use crate::pod::{self, PodId};
use crate::resources;
use crate::security;

fn labels(id: &PodId) -> BTreeMap<String, String> {
    BTreeMap::from([
        (keys::POD_NAME.into(), id.name.clone()),
        (keys::POD_NAMESPACE.into(), id.namespace.clone()),
        (keys::POD_UID.into(), id.uid.clone()),
    ])
}

/// The pod's sandbox. `host_resolv_conf` is the text of the node's own file.
///
/// # Errors
/// If the pod asks for something that can't be.
pub(crate) fn sandbox(
    pod: &Pod,
    config: &Config,
    attempt: u32,
    host_resolv_conf: &str,
) -> Result<SandboxSpec, Error> {
    let id = PodId::of(pod);
    let spec = pod::spec(pod);
    let cluster =
        dns::Cluster { dns: config.cluster_dns, domain: &config.cluster_domain, host: host_resolv_conf };
    Ok(SandboxSpec {
        attempt,
        hostname: dns::kernel_hostname(pod, &config.cluster_domain),
        resolv_conf: dns::resolv_conf(pod, &cluster),
        host_network: pod::host_network(pod),
        host_pid: spec.host_pid.unwrap_or(false),
        host_ipc: spec.host_ipc.unwrap_or(false),
        sysctls: security::sysctls(pod),
        log_directory: config.pod_log_dir.join(id.log_folder()),
        cgroup: resources::cgroup(pod, &id.uid),
        resources: resources::whole_pod(pod),
        labels: labels(&id),
        annotations: pod.metadata.annotations.clone().unwrap_or_default(),
        port_mappings: network::port_mappings(pod),
        bandwidth: network::bandwidth(pod)?,
        name: id.name,
        namespace: id.namespace,
        uid: id.uid,
    })
}

/// What a container is made from besides its own specification.
pub(crate) struct Parts {
    pub(crate) attempt: u32,
    pub(crate) image_id: String,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) security: Security,
    /// The termination message's file on the node.
    pub(crate) message_file: PathBuf,
    pub(crate) node_memory_bytes: u64,
}

/// A container of the pod.
pub(crate) fn container(pod: &Pod, container: &Container, parts: Parts) -> ContainerSpec {
    let id = PodId::of(pod);
    let variables: BTreeMap<String, String> = parts.env.iter().cloned().collect();
    let expanded = |list: &Option<Vec<String>>| {
        list.iter().flatten().map(|text| env::expand(text, &variables, &BTreeMap::new())).collect()
    };
    let mut labels = labels(&id);
    labels.insert(keys::CONTAINER_NAME.into(), container.name.clone());
    let message_path = message_path(container);
    let annotations = BTreeMap::from([
        (keys::HASH.into(), pod::container_hash(container)),
        (keys::RESTART_COUNT.into(), parts.attempt.to_string()),
        (keys::MESSAGE_PATH.into(), message_path.to_owned()),
        (
            keys::MESSAGE_POLICY.into(),
            container.termination_message_policy.clone().unwrap_or_else(|| "File".into()),
        ),
        (keys::MESSAGE_FILE.into(), parts.message_file.to_string_lossy().into_owned()),
        (keys::GRACE.into(), pod::spec(pod).termination_grace_period_seconds.unwrap_or(30).to_string()),
        (keys::IMAGE.into(), container.image.clone().unwrap_or_default()),
    ]);
    ContainerSpec {
        name: container.name.clone(),
        attempt: parts.attempt,
        image: parts.image_id,
        command: expanded(&container.command),
        args: expanded(&container.args),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        env: parts.env,
        mounts: parts.mounts,
        resources: resources::container(pod, container, parts.node_memory_bytes),
        security: parts.security,
        tty: container.tty.unwrap_or(false),
        stdin: container.stdin.unwrap_or(false),
        log_path: log_path(&container.name, parts.attempt),
        labels,
        annotations,
    }
}

/// A container's log below the pod's log folder.
pub(crate) fn log_path(container: &str, attempt: u32) -> PathBuf {
    Path::new(container).join(format!("{attempt}.log"))
}

/// Where the container finds its termination message's file.
pub(crate) fn message_path(container: &Container) -> &str {
    container.termination_message_path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/dev/termination-log")
}

/// The mounts that every container gets: hosts file (unless it brings its own) and termination message.
pub(crate) fn own_mounts(container: &Container, hosts_file: &Path, message_file: &Path) -> Vec<Mount> {
    let mount = |host: &Path, inside: &str| Mount {
        host_path: host.to_owned(),
        container_path: PathBuf::from(inside),
        read_only: false,
        propagation: Propagation::Private,
    };
    let mut mounts = Vec::new();
    if !container.volume_mounts.iter().flatten().any(|m| m.mount_path.trim_end_matches('/') == "/etc/hosts") {
        mounts.push(mount(hosts_file, "/etc/hosts"));
    }
    mounts.push(mount(message_file, message_path(container)));
    mounts
}

/// The text of the pod's hosts file.
pub(crate) fn hosts_file(pod: &Pod, ips: &[IpAddr], config: &Config) -> String {
    let node_hosts = if pod::host_network(pod) {
        // Without a hosts file of its own the node simply adds nothing.
        std::fs::read_to_string("/etc/hosts").unwrap_or_default()
    } else {
        String::new()
    };
    dns::hosts(pod, ips, &config.cluster_domain, &node_hosts)
}
