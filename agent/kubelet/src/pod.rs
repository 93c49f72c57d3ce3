//! Reading Pod objects: identities, container lists, policies. Pure.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

/// Who a pod is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PodId {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

impl PodId {
    pub(crate) fn of(pod: &Pod) -> Self {
        Self {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
        }
    }

    /// Name of its log folder.
    pub(crate) fn log_folder(&self) -> String {
        format!("{}_{}_{}", self.namespace, self.name, self.uid)
    }
}

impl fmt::Display for PodId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}({})", self.name, self.namespace, self.uid)
    }
}

/// The pod's specification; an absent one reads as empty.
pub(crate) fn spec(pod: &Pod) -> &PodSpec {
    static EMPTY: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
    pod.spec.as_ref().unwrap_or(&EMPTY)
}

/// When containers are started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

/// The pod's restart policy.
pub(crate) fn restart_policy(pod: &Pod) -> RestartPolicy {
    parse_policy(spec(pod).restart_policy.as_deref()).unwrap_or(RestartPolicy::Always)
}

/// The policy of one container: its own if it has one, else the pod's. Init containers restart like `OnFailure`
/// unless the pod says `Never`.
pub(crate) fn container_policy(pod: &Pod, container: &Container, init: bool) -> RestartPolicy {
    if let Some(own) = parse_policy(container.restart_policy.as_deref()) {
        return own;
    }
    let policy = restart_policy(pod);
    if init && policy == RestartPolicy::Always { RestartPolicy::OnFailure } else { policy }
}

fn parse_policy(text: Option<&str>) -> Option<RestartPolicy> {
    match text? {
        "Always" => Some(RestartPolicy::Always),
        "OnFailure" => Some(RestartPolicy::OnFailure),
        "Never" => Some(RestartPolicy::Never),
        _ => None,
    }
}

/// An init container that keeps running beside the others.
pub(crate) fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// The init containers.
pub(crate) fn init_containers(pod: &Pod) -> &[Container] {
    spec(pod).init_containers.as_deref().unwrap_or_default()
}

/// The main containers.
pub(crate) fn containers(pod: &Pod) -> &[Container] {
    &spec(pod).containers
}

/// All containers; `true` marks init containers.
pub(crate) fn all_containers(pod: &Pod) -> impl Iterator<Item = (&Container, bool)> {
    init_containers(pod).iter().map(|c| (c, true)).chain(containers(pod).iter().map(|c| (c, false)))
}

/// A container by name.
pub(crate) fn find_container<'a>(pod: &'a Pod, name: &str) -> Option<(&'a Container, bool)> {
    all_containers(pod).find(|(c, _)| c.name == name)
}

/// The field path that Events name a container by.
pub(crate) fn field_path(container: &str, init: bool) -> String {
    if init {
        format!("spec.initContainers{{{container}}}")
    } else {
        format!("spec.containers{{{container}}}")
    }
}

/// A pod's addresses in the order that the API wants: that of the node's primary family first, one of each family.
pub(crate) fn ordered_ips(ips: &[IpAddr], node: IpAddr) -> Vec<IpAddr> {
    let of = |v6: bool| ips.iter().find(|ip| ip.is_ipv6() == v6);
    of(node.is_ipv6()).into_iter().chain(of(!node.is_ipv6())).copied().collect()
}

/// The pod shares the node's network.
pub(crate) fn host_network(pod: &Pod) -> bool {
    spec(pod).host_network.unwrap_or(false)
}

/// The grace that a deletion or the specification gives.
pub(crate) fn grace(pod: &Pod) -> Duration {
    let seconds = pod
        .metadata
        .deletion_grace_period_seconds
        .or(spec(pod).termination_grace_period_seconds)
        .unwrap_or(30)
        // Upstream's least grace: also a forced deletion lets a process see SIGTERM.
        .max(1);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(1))
}

/// The API server has been asked to delete the pod.
pub(crate) fn is_deleting(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// The pod's phase as the API server has it.
pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or("")
}

/// The pod has ended for good.
pub(crate) fn is_terminal(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// What of a container makes a running one outdated: FNV-1a over name and image, which is all that may change in place.
pub(crate) fn container_hash(container: &Container) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let image = container.image.as_deref().unwrap_or_default();
    for byte in container.name.bytes().chain([0]).chain(image.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_follows_name_and_image_only() {
        let container = |name: &str, image: &str| Container {
            name: name.into(),
            image: Some(image.into()),
            ..Container::default()
        };
        let base = container_hash(&container("a", "b"));
        assert_eq!(base, container_hash(&Container { tty: Some(true), ..container("a", "b") }));
        assert_ne!(base, container_hash(&container("a", "c")));
        assert_ne!(container_hash(&container("ab", "c")), container_hash(&container("a", "bc")));
    }

    #[test]
    fn init_containers_restart_on_failure_in_a_pod_that_always_restarts() {
        let pod = Pod { spec: Some(PodSpec::default()), ..Pod::default() };
        let plain = Container::default();
        let sidecar = Container { restart_policy: Some("Always".into()), ..Container::default() };
        assert_eq!(container_policy(&pod, &plain, false), RestartPolicy::Always);
        assert_eq!(container_policy(&pod, &plain, true), RestartPolicy::OnFailure);
        assert_eq!(container_policy(&pod, &sidecar, true), RestartPolicy::Always);
    }
}
