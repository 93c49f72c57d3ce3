//! The pods and Services of the matrix.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use weft_tests_conformance::{Bed, Place, Site, server};
use weft_tests_harness::netns::{command_in, ip};

use crate::rules::{Backends, Cell, Client, Entry, Family, Node};

/// Where external addresses are taken from (RFC 5737, RFC 3849).
const EXTERNAL: [(Family, &str, &str); 2] =
    [(Family::V4, "203.0.113.", "203.0.113.0/24"), (Family::V6, "2001:db8:113::", "2001:db8:113::/64")];
/// Services with a class of their own have no load balancer but the test.
const CLASS: &str = "example.com/by-the-test";
/// Longer than the test takes.
const ENDING_SECONDS: u32 = 600;

/// The cluster, set up to be asked.
pub(crate) struct Stage {
    /// From where each client asks.
    pub(crate) places: BTreeMap<Client, Place>,
    /// The addresses that are a client's own.
    pub(crate) addresses: BTreeMap<Client, BTreeSet<IpAddr>>,
    nodes: BTreeMap<(Node, Family), IpAddr>,
    services: BTreeMap<(Backends, bool), Service>,
}

impl Stage {
    pub(crate) async fn build(bed: &Bed, site: &Site) -> anyhow::Result<Self> {
        let (one, two) = ("node-1", "node-2");
        let nodes = node_addresses(site, &[(Node::One, one), (Node::Two, two)]).await?;
        let pods = pods(site, one, two).await?;
        let mut places = BTreeMap::from([
            (Client::Pod, Place::Pod("client".to_owned())),
            (Client::FarPod, Place::Pod("far-client".to_owned())),
            (Client::Endpoint, Place::Pod("own".to_owned())),
            (Client::HostPod, Place::Pod("host-client".to_owned())),
            (Client::Node, bed.node(one)?),
            (Client::FarNode, bed.node(two)?),
            (Client::Outside, bed.outside()),
        ]);
        places.insert(Client::Unhooked, Place::Netns(netns_of(site, "client").await?));
        let mut addresses = BTreeMap::new();
        for (client, pod) in
            [(Client::Pod, "client"), (Client::FarPod, "far-client"), (Client::Endpoint, "own")]
        {
            addresses.insert(client, pod_addresses(&pods[pod])?);
        }
        addresses.insert(Client::Unhooked, addresses[&Client::Pod].clone());
        for client in [Client::Node, Client::FarNode, Client::Outside] {
            let Place::Netns(path) = &places[&client] else { anyhow::bail!("{client:?} is no namespace") };
            addresses.insert(client, device_addresses(path)?);
        }
        addresses.insert(Client::HostPod, addresses[&Client::Node].clone());
        for (family, _, range) in EXTERNAL {
            let gateway = nodes[&(Node::One, family)].to_string();
            ip(&["-n", bed.cluster.netns.name(), "route", "replace", range, "via", &gateway])?;
        }
        let services = services(site).await?;
        site.delete::<Pod>("ending").await?;
        published(site).await?;
        Ok(Self { places, addresses, nodes, services })
    }

    /// Which address a cell asks.
    pub(crate) fn address(&self, cell: &Cell) -> SocketAddr {
        let service = &self.services[&(cell.backends, cell.local)];
        let spec = service.spec.clone().unwrap_or_default();
        let status = service.status.clone().and_then(|status| status.load_balancer).unwrap_or_default();
        let ports = spec.ports.unwrap_or_default();
        let node_port = ports.first().and_then(|port| port.node_port).unwrap_or_default();
        let (texts, port) = match cell.entry {
            Entry::Cluster => (spec.cluster_ips.unwrap_or_default(), 80),
            Entry::External => (spec.external_ips.unwrap_or_default(), 80),
            Entry::Balancer => {
                (status.ingress.into_iter().flatten().filter_map(|ingress| ingress.ip).collect(), 80)
            }
            Entry::NodePort(node) => (
                vec![self.nodes[&(node, cell.family)].to_string()],
                u16::try_from(node_port).unwrap_or_default(),
            ),
        };
        let addresses = texts.iter().filter_map(|text| text.parse().ok());
        let address = addresses.into_iter().find(|address| cell.family.has(address));
        (address.expect("the Service was made with an address of each family"), port).into()
    }

    /// Ends the pod that would otherwise take its time.
    pub(crate) async fn clear(&self, site: &Site) -> anyhow::Result<()> {
        site.api::<Pod>().delete("ending", &DeleteParams::default().grace_period(0)).await?;
        Ok(())
    }
}

/// Waits until the slices say what the pods are.
async fn published(site: &Site) -> anyhow::Result<()> {
    for backends in Backends::ALL {
        let (name, wanted) = (service_name(backends, false), backends.endpoints());
        site.until(&format!("{name} has its endpoints"), async || {
            let selector = format!("kubernetes.io/service-name={name}");
            let list = site.api::<EndpointSlice>().list(&ListParams::default().labels(&selector)).await?;
            let endpoints: Vec<_> =
                list.items.into_iter().flat_map(|s| s.endpoints.unwrap_or_default()).collect();
            let conditions: BTreeSet<_> = endpoints
                .iter()
                .filter_map(|endpoint| {
                    let name = endpoint.target_ref.as_ref()?.name.clone()?;
                    let conditions = endpoint.conditions.as_ref()?;
                    Some((name, conditions.ready, conditions.serving, conditions.terminating))
                })
                .collect();
            let wanted: BTreeSet<_> = wanted
                .iter()
                .map(|(name, _, ready)| ((*name).to_owned(), Some(*ready), Some(true), Some(!ready)))
                .collect();
            ensure!(conditions == wanted, "it has {conditions:?}");
            Ok(Some(()))
        })
        .await?;
    }
    Ok(())
}

fn label(backends: Backends) -> String {
    format!("is-{}", format!("{backends:?}").to_lowercase())
}

fn service_name(backends: Backends, local: bool) -> String {
    format!("{}-{}", if local { "local" } else { "cluster" }, label(backends))
}

async fn pods(site: &Site, one: &str, two: &str) -> anyhow::Result<BTreeMap<String, Pod>> {
    let on = |name: &str, node: &str, serves: bool| {
        let mut pod = server(name, name, &["80/tcp", "80/udp"]);
        pod["spec"]["nodeName"] = json!(node);
        for backends in Backends::ALL {
            if backends.endpoints().iter().any(|(endpoint, ..)| *endpoint == name) {
                pod["metadata"]["labels"][label(backends)] = json!("yes");
            }
        }
        if !serves {
            pod["spec"]["containers"][0]["command"] = json!(["sleep", "100000"]);
        }
        pod
    };
    let mut host = on("host-client", one, false);
    host["spec"]["hostNetwork"] = json!(true);
    let mut ending = on("ending", one, true);
    ending["spec"]["terminationGracePeriodSeconds"] = json!(ENDING_SECONDS);
    ending["spec"]["containers"][0]["lifecycle"] = json!({"preStop": {"sleep": {"seconds": ENDING_SECONDS}}});
    let pods: Vec<Value> = vec![
        on("client", one, false),
        on("far-client", two, false),
        host,
        on("near", one, true),
        on("far", two, true),
        on("own", one, true),
        ending,
    ];
    let pods = site.pods(pods).await?;
    Ok(pods.into_iter().map(|pod| (pod.metadata.name.clone().unwrap_or_default(), pod)).collect())
}

async fn services(site: &Site) -> anyhow::Result<BTreeMap<(Backends, bool), Service>> {
    let mut services = BTreeMap::new();
    for backends in Backends::ALL {
        for local in [false, true] {
            let policy = if local { "Local" } else { "Cluster" };
            let number = services.len() + 1;
            let addresses =
                |from: usize| EXTERNAL.map(|(_, prefix, _)| format!("{prefix}{}", from + number)).to_vec();
            let spec = json!({
                "type": "LoadBalancer",
                "loadBalancerClass": CLASS,
                "ipFamilyPolicy": "RequireDualStack",
                "selector": {label(backends): "yes"},
                "externalTrafficPolicy": policy,
                "internalTrafficPolicy": policy,
                "externalIPs": addresses(0),
                "ports": [
                    {"name": "tcp", "port": 80, "protocol": "TCP", "nodePort": 31_000 + number},
                    {"name": "udp", "port": 80, "protocol": "UDP", "nodePort": 31_000 + number},
                ],
            });
            let name = service_name(backends, local);
            site.service(&name, spec).await?;
            let ingress: Vec<Value> = addresses(100).into_iter().map(|ip| json!({"ip": ip})).collect();
            let patch = Patch::Merge(json!({"status": {"loadBalancer": {"ingress": ingress}}}));
            let api = site.api::<Service>();
            services
                .insert((backends, local), api.patch_status(&name, &PatchParams::default(), &patch).await?);
        }
    }
    Ok(services)
}

/// The internal addresses of the nodes.
async fn node_addresses(
    site: &Site,
    names: &[(Node, &str)],
) -> anyhow::Result<BTreeMap<(Node, Family), IpAddr>> {
    let mut found = BTreeMap::new();
    for (node, name) in names {
        let object = Api::<core::Node>::all(site.client.clone()).get(name).await?;
        let addresses = object.status.and_then(|status| status.addresses).unwrap_or_default();
        for address in addresses.iter().filter(|address| address.type_ == "InternalIP") {
            let address: IpAddr = address.address.parse()?;
            found.extend(
                Family::ALL.iter().filter(|family| family.has(&address)).map(|f| ((*node, *f), address)),
            );
        }
    }
    ensure!(found.len() == names.len() * Family::ALL.len(), "the nodes' addresses are {found:?}");
    Ok(found)
}

fn pod_addresses(pod: &Pod) -> anyhow::Result<BTreeSet<IpAddr>> {
    let ips = pod.status.as_ref().and_then(|status| status.pod_ips.as_ref());
    ips.into_iter().flatten().map(|ip| Ok(ip.ip.parse()?)).collect()
}

/// The network namespace of a pod, as the machine sees it.
async fn netns_of(site: &Site, pod: &str) -> anyhow::Result<PathBuf> {
    let said = site.exec(pod, &["readlink", "/proc/self/ns/net"]).await?;
    let wanted = said.out.trim();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path().join("ns").join("net");
        if std::fs::read_link(&path).is_ok_and(|link| link.as_os_str() == wanted) {
            return Ok(path);
        }
    }
    anyhow::bail!("no process is in {pod}'s namespace {wanted}")
}

/// The addresses of the devices in a namespace, loopback's excepted.
fn device_addresses(netns: &Path) -> anyhow::Result<BTreeSet<IpAddr>> {
    let output = command_in(netns, "ip")?.args(["-o", "addr", "show", "scope", "global"]).output()?;
    ensure!(output.status.success(), "ip: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let addresses = text.lines().filter(|line| !line.contains(": lo ")).filter_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| !word.starts_with("inet"));
        words.nth(1).and_then(|network| network.split('/').next()).map(str::to_owned)
    });
    addresses.map(|address| address.parse().context("an address")).collect()
}
