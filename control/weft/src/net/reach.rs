//! The way to the cluster: its API as the administrator, and the dataplane of each node of this machine.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use weft_agent_dataplane::observe::expected::Found;
use weft_agent_dataplane::observe::wire::{Ejected, FromAnswer, Request};
use weft_agent_dataplane::observe::{Observer, socket};

use crate::cluster::Cluster;
use crate::nodes;
use crate::paths::Paths;

/// Label on a slice that names its Service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// The cluster as the commands reach it.
pub(crate) struct Reach {
    pub(crate) client: kube::Client,
    pub(crate) paths: Paths,
    pub(crate) cluster: Cluster,
    pub(crate) nodes: Vec<NodeHandle>,
}

/// A node of this machine.
#[derive(Debug)]
pub(crate) struct NodeHandle {
    pub(crate) name: String,
    socket: PathBuf,
    observer: Observer,
}

impl Reach {
    /// Finds the cluster of the data directory, and asks its API as the administrator.
    pub(crate) async fn open(paths: &Paths) -> anyhow::Result<Self> {
        Self::open_as(paths, &paths.admin_kubeconfig()).await
    }

    /// Finds the cluster of the data directory, and asks its API with a kubeconfig.
    pub(crate) async fn open_as(paths: &Paths, path: &Path) -> anyhow::Result<Self> {
        let cluster = Cluster::read(&paths.cluster_file())?.with_context(|| {
            format!("there is no cluster in {}; start one with `weft up`", paths.data.display())
        })?;
        let file = kube::config::Kubeconfig::read_from(path)
            .with_context(|| format!("cannot use {}", path.display()))?;
        let options = kube::config::KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(file, &options).await?;
        let client = kube::Client::try_from(config)?;
        let nodes = cluster.nodes.iter().map(|name| NodeHandle::new(paths, name)).collect();
        Ok(Self { client, paths: paths.clone(), cluster, nodes })
    }

    /// A node of this machine by its name.
    pub(crate) fn node(&self, name: &str) -> anyhow::Result<&NodeHandle> {
        let found = self.nodes.iter().find(|node| node.name == name);
        found.with_context(|| format!("node {name} is not on this machine; ask there"))
    }

    /// Addresses of Services that the nodes answer themselves: they are in no map.
    pub(crate) fn node_local(&self) -> Vec<IpAddr> {
        self.cluster.dns_ips().iter().collect()
    }

    /// The Services of a namespace, or of all.
    pub(crate) async fn services(&self, namespace: Option<&str>) -> anyhow::Result<Vec<Service>> {
        let api: Api<Service> = self.api(namespace);
        Ok(api.list(&ListParams::default()).await.context("cannot list the Services")?.items)
    }

    /// A Service, if there is one of that name.
    pub(crate) async fn service(&self, namespace: &str, name: &str) -> anyhow::Result<Option<Service>> {
        let api: Api<Service> = self.api(Some(namespace));
        api.get_opt(name).await.with_context(|| format!("cannot get the Service {namespace}/{name}"))
    }

    /// The slices of a Service, or all of a namespace, or all.
    pub(crate) async fn slices(
        &self,
        namespace: Option<&str>,
        service: Option<&str>,
    ) -> anyhow::Result<Vec<EndpointSlice>> {
        let api: Api<EndpointSlice> = self.api(namespace);
        let params = match service {
            Some(name) => ListParams::default().labels(&format!("{SERVICE_NAME_LABEL}={name}")),
            None => ListParams::default(),
        };
        Ok(api.list(&params).await.context("cannot list the EndpointSlices")?.items)
    }

    /// The Nodes.
    pub(crate) async fn api_nodes(&self) -> anyhow::Result<Vec<Node>> {
        let api: Api<Node> = Api::all(self.client.clone());
        Ok(api.list(&ListParams::default()).await.context("cannot list the Nodes")?.items)
    }

    /// Pods of a namespace that have these labels, or all.
    pub(crate) async fn pods(&self, namespace: Option<&str>, labels: &str) -> anyhow::Result<Vec<Pod>> {
        let api: Api<Pod> = self.api(namespace);
        Ok(api.list(&ListParams::default().labels(labels)).await.context("cannot list the Pods")?.items)
    }

    /// The policies of a namespace.
    pub(crate) async fn policies(&self, namespace: &str) -> anyhow::Result<Vec<NetworkPolicy>> {
        let api: Api<NetworkPolicy> = self.api(Some(namespace));
        Ok(api.list(&ListParams::default()).await.context("cannot list the NetworkPolicies")?.items)
    }

    /// A pod, if there is one of that name.
    pub(crate) async fn pod(&self, namespace: &str, name: &str) -> anyhow::Result<Option<Pod>> {
        let api: Api<Pod> = self.api(Some(namespace));
        api.get_opt(name).await.with_context(|| format!("cannot get the Pod {namespace}/{name}"))
    }

    /// The pods that have an address and still run; several if they share their node's.
    pub(crate) async fn pods_at(&self, address: IpAddr) -> anyhow::Result<Vec<Pod>> {
        let api: Api<Pod> = self.api(None);
        let params = ListParams::default().fields(&format!("status.podIP={address}"));
        let pods = api.list(&params).await.context("cannot list the Pods by their address")?.items;
        let finished = |pod: &Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            matches!(phase, Some("Succeeded" | "Failed"))
        };
        Ok(pods.into_iter().filter(|pod| !finished(pod)).collect())
    }

    fn api<K>(&self, namespace: Option<&str>) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        match namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }
}

impl NodeHandle {
    fn new(paths: &Paths, name: &str) -> Self {
        let node = paths.node(name);
        let namespaces = node.namespaces();
        // A node alone on its machine has no namespace of its own: it has the one that it was started in, as this process.
        let netns = nodes::exist(&namespaces).then(|| namespaces.join("net"));
        let observer = Observer { pins: node.bpffs(), netns, cgroup: paths.node_cgroup(name) };
        Self { name: name.to_owned(), socket: node.control_socket(), observer }
    }

    /// Whether its agent runs and listens.
    pub(crate) fn agent_answers(&self) -> bool {
        std::os::unix::net::UnixStream::connect(&self.socket).is_ok()
    }

    /// Watches its flows.
    pub(crate) async fn watch(&self, drops_only: bool) -> anyhow::Result<socket::Watch> {
        let watch = socket::Watch::open(&self.socket, &self.observer, drops_only).await;
        watch.with_context(|| format!("node {}", self.name))
    }

    /// What it has found out by itself, and leaves out of Services.
    pub(crate) fn found(&self, nodes: &[Node]) -> anyhow::Result<Found> {
        let ejected: Vec<Ejected> = self.ask(&Request::Ejected)?;
        let ejected = ejected.into_iter().map(|one| one.key).collect();
        Ok(Found { silent: self.silent(nodes)?, ejected })
    }

    /// Names of the other nodes that don't answer it: their endpoints are left out there.
    pub(crate) fn silent(&self, nodes: &[Node]) -> anyhow::Result<BTreeSet<String>> {
        let addresses: BTreeSet<IpAddr> = self.ask(&Request::Silent)?;
        let silent = nodes
            .iter()
            .filter(|node| super::why::addresses(node).iter().any(|address| addresses.contains(address)));
        Ok(silent.map(ResourceExt::name_any).collect())
    }

    /// Asks the node's agent; without one, the kernel itself.
    pub(crate) fn ask<A: FromAnswer>(&self, request: &Request) -> anyhow::Result<A> {
        let asked = match socket::ask(&self.socket, request) {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => self.observer.answer(request),
            Err(error) => Err(error),
        };
        let answer = asked.with_context(|| format!("node {}", self.name))?;
        A::from_answer(answer)
            .with_context(|| format!("node {} answers something else than it was asked", self.name))
    }
}
