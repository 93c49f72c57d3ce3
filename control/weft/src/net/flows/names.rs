//! Names of the ends of flows: pods and Services by their addresses.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt as _;
use serde::Serialize;
use weft_agent_dataplane::observe::flows::Flow;
use weft_agent_dataplane::observe::wire::Protocol;

use crate::net::reach::Reach;
use crate::net::service::external_ips;

/// How often something unknown makes the API be asked again.
const RELEARN: Duration = Duration::from_secs(1);

/// An end of a flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Named {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pod: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) service: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) node: Option<String>,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.service.as_ref().or(self.pod.as_ref()).or(self.node.as_ref());
        match (name, &self.address) {
            (Some(name), Some(address)) => write!(f, "{name} ({address})"),
            (Some(name), None) => f.write_str(name),
            (None, Some(address)) => f.write_str(address),
            (None, None) => f.write_str("?"),
        }
    }
}

/// What is known of addresses; learned from the API when something unknown comes.
pub(super) struct Names<'a> {
    reach: &'a Reach,
    pods: HashMap<IpAddr, String>,
    uids: HashMap<String, String>,
    services: HashMap<(IpAddr, u16, Protocol), String>,
    /// Services by their addresses, for ports that they don't serve.
    owners: HashMap<IpAddr, String>,
    node_ports: HashMap<(u16, Protocol), String>,
    nodes: HashMap<IpAddr, String>,
    /// Addresses that the API has been asked about in vain.
    strange: HashSet<IpAddr>,
    learned: Option<Instant>,
}

impl<'a> Names<'a> {
    pub(super) fn new(reach: &'a Reach) -> Self {
        Self {
            reach,
            pods: HashMap::new(),
            uids: HashMap::new(),
            services: HashMap::new(),
            owners: HashMap::new(),
            node_ports: HashMap::new(),
            nodes: HashMap::new(),
            strange: HashSet::new(),
            learned: None,
        }
    }

    /// Asks the API if a flow has an end that is not known, but not too often.
    pub(super) async fn learn(&mut self, flow: &Flow) -> anyhow::Result<()> {
        let ends = [flow.source, Some(flow.destination), flow.backend];
        let unknown: Vec<IpAddr> = ends
            .into_iter()
            .flatten()
            .filter(|end| !self.is_known(*end, flow.protocol))
            .map(|end| end.ip())
            .collect();
        let strange_pod = flow.pod_uid.as_ref().is_some_and(|uid| !self.uids.contains_key(uid));
        let fresh = self.learned.is_some_and(|at| at.elapsed() < RELEARN);
        if (unknown.is_empty() && !strange_pod) || fresh {
            return Ok(());
        }
        self.learned = Some(Instant::now());
        self.relearn().await?;
        self.strange.extend(unknown);
        Ok(())
    }

    fn is_known(&self, end: SocketAddr, protocol: Protocol) -> bool {
        let address = end.ip();
        self.services.contains_key(&(address, end.port(), protocol))
            || self.owners.contains_key(&address)
            || self.pods.contains_key(&address)
            || self.nodes.contains_key(&address)
            || self.strange.contains(&address)
    }

    async fn relearn(&mut self) -> anyhow::Result<()> {
        self.strange.clear();
        self.pods.clear();
        self.services.clear();
        self.owners.clear();
        self.node_ports.clear();
        for pod in self.reach.pods(None, "").await? {
            let name = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
            if let Some(uid) = pod.uid() {
                self.uids.insert(uid, name.clone());
            }
            let host = pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true));
            let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
            for address in ips.filter(|_| !host).filter_map(|ip| ip.ip.parse().ok()) {
                self.pods.insert(address, name.clone());
            }
        }
        for node in self.reach.api_nodes().await? {
            let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
            for address in addresses.filter_map(|address| address.address.parse().ok()) {
                self.nodes.insert(address, node.name_any());
            }
        }
        for service in self.reach.services(None).await? {
            self.enter(&service);
        }
        Ok(())
    }

    fn enter(&mut self, service: &Service) {
        let name = format!("{}/{}", service.namespace().unwrap_or_default(), service.name_any());
        let spec = service.spec.clone().unwrap_or_default();
        let listed = spec.cluster_ips.into_iter().flatten().chain(external_ips(service));
        let addresses: Vec<IpAddr> = listed.filter_map(|ip| ip.parse().ok()).collect();
        self.owners.extend(addresses.iter().map(|address| (*address, name.clone())));
        for port in spec.ports.into_iter().flatten() {
            let Ok(protocol) = port.protocol.as_deref().unwrap_or("TCP").parse::<Protocol>() else {
                continue;
            };
            let number = |port: i32| u16::try_from(port).ok().filter(|port| *port != 0);
            for address in &addresses {
                if let Some(port) = number(port.port) {
                    self.services.insert((*address, port, protocol), name.clone());
                }
            }
            if let Some(port) = port.node_port.and_then(number) {
                self.node_ports.insert((port, protocol), name.clone());
            }
        }
    }

    pub(super) fn pod_of(&self, uid: &str) -> Option<String> {
        Some(self.uids.get(uid).cloned().unwrap_or_else(|| format!("pod {uid}")))
    }

    /// What has an address.
    pub(super) fn end(&self, end: SocketAddr, protocol: Protocol) -> Named {
        let address = end.ip();
        let node = self.nodes.get(&address).cloned();
        let by_port = self.node_ports.get(&(end.port(), protocol)).filter(|_| node.is_some());
        Named {
            address: Some(end.to_string()),
            pod: self.pods.get(&address).cloned(),
            service: self
                .services
                .get(&(address, end.port(), protocol))
                .or(by_port)
                .or_else(|| self.owners.get(&address))
                .cloned(),
            node,
        }
    }
}
