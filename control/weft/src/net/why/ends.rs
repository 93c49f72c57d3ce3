//! The two ends of a connection, as an administrator names them: pods, Services, nodes, addresses.

use std::net::IpAddr;

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::ResourceExt;

use crate::cluster::DOMAIN;
use crate::net::reach::Reach;

/// A pod, as far as the way to it goes.
#[derive(Clone, Debug)]
pub(crate) struct PodEnd {
    pub(crate) pod: Box<Pod>,
}

impl PodEnd {
    /// Namespace and name.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.pod.namespace().unwrap_or_default(), self.pod.name_any())
    }

    pub(crate) fn uid(&self) -> Option<String> {
        self.pod.uid()
    }

    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.pod.status.as_ref()?.pod_ip.as_deref()?.parse().ok()
    }

    pub(crate) fn node(&self) -> Option<&str> {
        self.pod.spec.as_ref()?.node_name.as_deref()
    }

    pub(crate) fn host_network(&self) -> bool {
        self.pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true))
    }

    /// Number of a port that a container names.
    fn named_port(&self, name: &str) -> Option<u16> {
        let containers = self.pod.spec.iter().flat_map(|spec| &spec.containers);
        let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
        let port = ports.find(|port| port.name.as_deref() == Some(name))?;
        u16::try_from(port.container_port).ok()
    }
}

/// Who connects.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Pod(PodEnd),
    Node { name: String, address: IpAddr },
    Outside(IpAddr),
}

impl Source {
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Pod(pod) => format!("pod {}", pod.name()),
            Self::Node { name, .. } => format!("node {name}"),
            Self::Outside(address) => format!("{address} (outside)"),
        }
    }
}

/// Where to.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    Service(Box<Service>),
    Pod(PodEnd),
    Node {
        name: String,
        address: IpAddr,
    },
    Address(IpAddr),
    /// Nothing has this name.
    Nothing {
        kind: &'static str,
        name: String,
    },
}

/// A port as it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PortName {
    Number(u16),
    Name(String),
}

impl std::fmt::Display for PortName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Finds the ends among the cluster's objects.
pub(crate) struct Finder<'a> {
    pub(crate) reach: &'a Reach,
    pub(crate) nodes: &'a [Node],
    /// Namespace of what is given by its name alone.
    pub(crate) namespace: &'a str,
}

impl Finder<'_> {
    /// Who connects.
    pub(crate) async fn source(&self, text: &str) -> anyhow::Result<Source> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return self.source_at(address).await;
        }
        let (kind, rest) = kind_of(text);
        if kind != Kind::Pod
            && let Some((name, address)) = self.node(rest)
        {
            return Ok(Source::Node { name, address });
        }
        ensure!(kind != Kind::Node, "there is no node {rest}");
        ensure!(kind != Kind::Service, "a Service does not connect; name a pod, a node or an address");
        let (namespace, name) = rest.split_once('/').unwrap_or((self.namespace, rest));
        let pod = self.pod(namespace, name).await?;
        let pod = pod.with_context(|| format!("there is no pod {namespace}/{name}, and no node {rest}"))?;
        Ok(Source::Pod(pod))
    }

    /// An address of ours is what has it; any other is outside.
    async fn source_at(&self, address: IpAddr) -> anyhow::Result<Source> {
        if let Some(name) = node_at(self.nodes, address) {
            return Ok(Source::Node { name, address });
        }
        Ok(match self.pod_at(address).await? {
            Some(pod) => Source::Pod(pod),
            None => Source::Outside(address),
        })
    }

    /// Where to. A name alone is looked for in `home`, as the names of a pod are in its own namespace.
    pub(crate) async fn target(&self, text: &str, home: &str) -> anyhow::Result<Target> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(match self.pod_at(address).await? {
                Some(pod) => Target::Pod(pod),
                None => match node_at(self.nodes, address) {
                    Some(name) => Target::Node { name, address },
                    None => Target::Address(address),
                },
            });
        }
        let (kind, rest) = kind_of(text);
        let dns = dns_name(rest);
        let (namespace, name) = match (rest.split_once('/'), &dns) {
            (Some(pair), _) => pair,
            (None, Some((namespace, name))) => (namespace.as_str(), name.as_str()),
            (None, None) => (home, rest),
        };
        if [Kind::Any, Kind::Service].contains(&kind)
            && let Some(service) = self.reach.service(namespace, name).await?
        {
            return Ok(Target::Service(Box::new(service)));
        }
        if [Kind::Any, Kind::Pod].contains(&kind)
            && let Some(pod) = self.pod(namespace, name).await?
        {
            return Ok(Target::Pod(pod));
        }
        if [Kind::Any, Kind::Node].contains(&kind)
            && let Some((name, address)) = self.node(rest)
        {
            return Ok(Target::Node { name, address });
        }
        let kind = if kind == Kind::Pod { "pod" } else { "Service" };
        Ok(Target::Nothing { kind, name: format!("{namespace}/{name}") })
    }

    async fn pod(&self, namespace: &str, name: &str) -> anyhow::Result<Option<PodEnd>> {
        Ok(self.reach.pod(namespace, name).await?.map(|pod| PodEnd { pod: Box::new(pod) }))
    }

    /// The pod with an address of its own; those on the host's network share it with their node.
    async fn pod_at(&self, address: IpAddr) -> anyhow::Result<Option<PodEnd>> {
        let pods = self.reach.pods_at(address).await?;
        let mut ends = pods.into_iter().map(|pod| PodEnd { pod: Box::new(pod) });
        Ok(ends.find(|end| !end.host_network() && end.address() == Some(address)))
    }

    fn node(&self, name: &str) -> Option<(String, IpAddr)> {
        let node = self.nodes.iter().find(|node| node.name_any() == name)?;
        Some((name.to_owned(), *addresses(node).first()?))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Any,
    Service,
    Pod,
    Node,
}

fn kind_of(text: &str) -> (Kind, &str) {
    let kinds =
        [("svc/", Kind::Service), ("service/", Kind::Service), ("pod/", Kind::Pod), ("node/", Kind::Node)];
    for (prefix, kind) in kinds {
        // A namespace may be called "pod": with one slash only, it is NAMESPACE/NAME unless no other reading is possible.
        if let Some(rest) = text.strip_prefix(prefix)
            && (rest.contains('/') || kind == Kind::Node || prefix == "svc/" || prefix == "pod/")
        {
            return (kind, rest);
        }
    }
    (Kind::Any, text)
}

/// `web.default`, `web.default.svc`, `web.default.svc.cluster.local`: namespace and name.
fn dns_name(text: &str) -> Option<(String, String)> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let text = text.strip_suffix(&format!(".{DOMAIN}")).unwrap_or(text);
    let text = text.strip_suffix(".svc").unwrap_or(text);
    let (name, namespace) = text.split_once('.')?;
    (!namespace.contains(['.', '/'])).then(|| (namespace.to_owned(), name.to_owned()))
}

/// Addresses of a Node: internal ones first.
pub(crate) fn addresses(node: &Node) -> Vec<IpAddr> {
    let listed = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let mut found: Vec<_> =
        listed.filter_map(|a| Some((a.type_ != "InternalIP", a.address.parse::<IpAddr>().ok()?))).collect();
    found.sort_by_key(|(external, _)| *external);
    found.into_iter().map(|(_, address)| address).collect()
}

/// The Node that has an address.
pub(crate) fn node_at(nodes: &[Node], address: IpAddr) -> Option<String> {
    nodes.iter().find(|node| addresses(node).contains(&address)).map(ResourceExt::name_any)
}

/// Splits `TO:PORT`.
pub(crate) fn split_port(text: &str) -> anyhow::Result<(String, PortName)> {
    let (to, port) =
        text.rsplit_once(':').with_context(|| format!("{text:?} names no port; write TO:PORT"))?;
    ensure!(!to.is_empty() && !port.is_empty(), "{text:?} is not TO:PORT");
    let to = to.strip_prefix('[').and_then(|to| to.strip_suffix(']')).unwrap_or(to);
    let port = match port.parse::<u16>() {
        Ok(0) => bail!("0 is no port"),
        Ok(number) => PortName::Number(number),
        Err(_) => PortName::Name(port.to_owned()),
    };
    Ok((to.to_owned(), port))
}

/// The number of a port at a pod.
pub(crate) fn pod_port(pod: &PodEnd, port: &PortName) -> anyhow::Result<u16> {
    match port {
        PortName::Number(number) => Ok(*number),
        PortName::Name(name) => pod
            .named_port(name)
            .with_context(|| format!("no container of pod {} names a port {name}", pod.name())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_split_from_their_ports() {
        let (to, port) = split_port("default/web:80").unwrap();
        assert_eq!((to.as_str(), port), ("default/web", PortName::Number(80)));
        let (to, port) = split_port("[fd00::1]:http").unwrap();
        assert_eq!((to.as_str(), port), ("fd00::1", PortName::Name("http".to_owned())));
        for wrong in ["web", "web:", ":80", "web:0"] {
            assert!(split_port(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_say_what_they_are() {
        assert_eq!(kind_of("svc/web"), (Kind::Service, "web"));
        assert_eq!(kind_of("svc/default/web"), (Kind::Service, "default/web"));
        assert_eq!(kind_of("service/web"), (Kind::Any, "service/web"), "a namespace may be called so");
        assert_eq!(kind_of("node/node-1"), (Kind::Node, "node-1"));
        assert_eq!(kind_of("default/web"), (Kind::Any, "default/web"));
        let name = Some(("default".to_owned(), "web".to_owned()));
        for text in ["web.default", "web.default.svc", "web.default.svc.cluster.local."] {
            assert_eq!(dns_name(text), name, "{text}");
        }
        assert_eq!(dns_name("web"), None);
        assert_eq!(dns_name("www.example.com"), None);
    }
}
