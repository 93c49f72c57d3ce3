//! Owns the caches: one informer per kind, shared by all controllers, holding no more than they read.

use crate::claim;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, Endpoints, Namespace, Node, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use kube::{Api, Client};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use weft_control_client::informer::{Informer, Selection};

/// Index of pods and ReplicaSets by the uid of their controller, or by namespace if they have none.
pub(crate) const BY_OWNER: &str = "owner";
/// Index of pods by node.
pub(crate) const BY_NODE: &str = "node";
/// Index of EndpointSlices by `namespace/service`.
pub(crate) const BY_SERVICE: &str = "service";
/// The ConfigMap that the root CA publisher keeps in every namespace.
pub(crate) const ROOT_CA: &str = "kube-root-ca.crt";
/// Label that names a slice's Service.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
const NODE_LEASES: &str = "kube-node-lease";

/// The caches.
pub(crate) struct Shared {
    pub(crate) pods: Arc<Informer<Pod>>,
    pub(crate) replica_sets: Arc<Informer<ReplicaSet>>,
    pub(crate) deployments: Arc<Informer<Deployment>>,
    pub(crate) services: Arc<Informer<Service>>,
    pub(crate) nodes: Arc<Informer<Node>>,
    pub(crate) namespaces: Arc<Informer<Namespace>>,
    pub(crate) endpoint_slices: Arc<Informer<EndpointSlice>>,
    pub(crate) endpoints: Arc<Informer<Endpoints>>,
    pub(crate) service_cidrs: Arc<Informer<ServiceCIDR>>,
    pub(crate) ip_addresses: Arc<Informer<IPAddress>>,
    pub(crate) service_accounts: Arc<Informer<ServiceAccount>>,
    pub(crate) root_cas: Arc<Informer<ConfigMap>>,
    pub(crate) node_leases: Arc<Informer<Lease>>,
}

impl Shared {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            pods: Informer::new(trim_pod, vec![(BY_OWNER, claim::index), (BY_NODE, by_node)]),
            replica_sets: Informer::new(|_| {}, vec![(BY_OWNER, claim::index)]),
            deployments: Informer::new(|_| {}, vec![]),
            services: Informer::new(|_| {}, vec![]),
            nodes: Informer::new(trim_node, vec![]),
            namespaces: Informer::new(|_| {}, vec![]),
            endpoint_slices: Informer::new(|_| {}, vec![(BY_SERVICE, by_service)]),
            endpoints: Informer::new(|_| {}, vec![]),
            service_cidrs: Informer::new(|_| {}, vec![]),
            ip_addresses: Informer::new(|_| {}, vec![]),
            service_accounts: Informer::new(|_| {}, vec![]),
            root_cas: Informer::new(|_| {}, vec![]),
            node_leases: Informer::new(|_| {}, vec![]),
        })
    }

    /// Fills the caches until `shutdown`.
    pub(crate) async fn run(&self, readers: Readers, shutdown: &CancellationToken) {
        let all = Selection::default;
        let named = |name: &str| Selection { fields: Some(format!("metadata.name={name}")), labels: None };
        let stop = || shutdown.clone();
        let Readers {
            deployments,
            replica_sets,
            slices,
            endpoints,
            ranges,
            namespaces,
            nodes,
            accounts,
            roots,
        } = readers;
        tokio::join!(
            self.pods.run(Api::all(replica_sets), all(), stop()),
            self.replica_sets.run(Api::all(deployments.clone()), all(), stop()),
            self.deployments.run(Api::all(deployments), all(), stop()),
            self.services.run(Api::all(slices.clone()), all(), stop()),
            self.nodes.run(Api::all(nodes.clone()), all(), stop()),
            self.namespaces.run(Api::all(namespaces), all(), stop()),
            self.endpoint_slices.run(Api::all(slices), all(), stop()),
            self.endpoints.run(Api::all(endpoints), all(), stop()),
            self.service_cidrs.run(Api::all(ranges.clone()), all(), stop()),
            self.ip_addresses.run(Api::all(ranges), all(), stop()),
            self.service_accounts.run(Api::all(accounts), named("default"), stop()),
            self.root_cas.run(Api::all(roots), named(ROOT_CA), stop()),
            self.node_leases.run(Api::namespaced(nodes, NODE_LEASES), all(), stop()),
        );
    }
}

/// Who fills the caches: for each kind a controller that may read it, so that no identity may read everything.
pub(crate) struct Readers {
    deployments: Client,
    replica_sets: Client,
    slices: Client,
    endpoints: Client,
    ranges: Client,
    namespaces: Client,
    nodes: Client,
    accounts: Client,
    roots: Client,
}

impl Readers {
    pub(crate) fn new(clients: &impl Fn(&str) -> Client) -> Self {
        Self {
            deployments: clients("deployment-controller"),
            replica_sets: clients("replicaset-controller"),
            slices: clients("endpointslice-controller"),
            endpoints: clients("endpoint-controller"),
            ranges: clients("service-cidrs-controller"),
            namespaces: clients("namespace-controller"),
            nodes: clients("node-controller"),
            accounts: clients("service-account-controller"),
            roots: clients("root-ca-cert-publisher"),
        }
    }
}

fn by_node(pod: &Pod) -> Option<String> {
    pod.spec.as_ref()?.node_name.clone()
}

fn by_service(slice: &EndpointSlice) -> Option<String> {
    let service = slice.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    Some(format!("{}/{service}", slice.metadata.namespace.as_deref().unwrap_or_default()))
}

/// Pods are by far the most objects. What stays is what selectors, ranking, endpoints, eviction and node loss read;
/// a cached pod must therefore never be written back whole.
fn trim_pod(pod: &mut Pod) {
    if let Some(annotations) = &mut pod.metadata.annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
    if let Some(spec) = &mut pod.spec {
        spec.volumes = None;
        spec.affinity = None;
        spec.ephemeral_containers = None;
        spec.security_context = None;
        spec.image_pull_secrets = None;
        spec.topology_spread_constraints = None;
        let containers = spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten());
        containers.for_each(trim_container);
    }
    if let Some(status) = &mut pod.status {
        let statuses = status.container_statuses.iter_mut().flatten();
        for container in statuses.chain(status.init_container_statuses.iter_mut().flatten()) {
            container.image = String::new();
            container.image_id = String::new();
            container.container_id = None;
            container.last_state = None;
            container.resources = None;
            container.allocated_resources = None;
            container.volume_mounts = None;
        }
    }
}

fn trim_container(container: &mut Container) {
    *container = Container {
        name: std::mem::take(&mut container.name),
        ports: container.ports.take(),
        restart_policy: container.restart_policy.take(),
        ..Container::default()
    };
}

fn trim_node(node: &mut Node) {
    if let Some(status) = &mut node.status {
        status.images = None;
        status.volumes_attached = None;
        status.volumes_in_use = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{ContainerPort, EnvVar, PodSpec, Volume};

    #[test]
    fn a_trimmed_pod_keeps_its_ports_and_drops_the_rest() {
        let container = Container {
            name: "web".into(),
            env: Some(vec![EnvVar::default()]),
            ports: Some(vec![ContainerPort { container_port: 80, ..ContainerPort::default() }]),
            ..Container::default()
        };
        let spec = PodSpec {
            containers: vec![container],
            volumes: Some(vec![Volume::default()]),
            node_name: Some("n1".into()),
            ..PodSpec::default()
        };
        let mut pod = Pod { spec: Some(spec), ..Pod::default() };
        trim_pod(&mut pod);
        let spec = pod.spec.unwrap();
        assert_eq!(spec.containers[0].ports.as_ref().unwrap()[0].container_port, 80);
        assert_eq!((&spec.containers[0].env, &spec.volumes), (&None, &None));
        assert_eq!(spec.node_name.as_deref(), Some("n1"));
    }
}
