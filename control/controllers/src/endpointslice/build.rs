//! Owns the way from a Service's pods to endpoints, in the form that EndpointSlices and Endpoints share.

use crate::pod;
use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeMap;
use std::sync::Arc;

const ZONE: &str = "topology.kubernetes.io/zone";

/// The ports of a slice, ordered, as the key under which endpoints are grouped.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ports(pub(crate) Vec<Port>);

/// One port of a slice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) protocol: String,
    pub(crate) port: i32,
    pub(crate) app_protocol: Option<String>,
}

impl Ports {
    pub(crate) fn from_slice(ports: &[EndpointPort]) -> Self {
        let mut all: Vec<_> = ports
            .iter()
            .map(|p| Port {
                name: p.name.clone().unwrap_or_default(),
                protocol: p.protocol.clone().unwrap_or_default(),
                port: p.port.unwrap_or(0),
                app_protocol: p.app_protocol.clone(),
            })
            .collect();
        all.sort();
        Self(all)
    }

    pub(crate) fn to_slice(&self) -> Vec<EndpointPort> {
        let port = |p: &Port| EndpointPort {
            name: Some(p.name.clone()),
            protocol: Some(p.protocol.clone()),
            port: Some(p.port),
            app_protocol: p.app_protocol.clone(),
        };
        self.0.iter().map(port).collect()
    }
}

/// Annotation on a pod, and on a slice of such pods: their share of new connections, in proportion to others'.
pub(crate) const WEIGHT: &str = "weft.dev/weight";

/// What the endpoints of a slice have in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Group {
    pub(crate) ports: Ports,
    /// As it is written; the nodes read it.
    pub(crate) weight: Option<String>,
}

/// The endpoints wanted for one address family, by group and then by the pod's uid.
pub(crate) type Wanted = BTreeMap<Group, BTreeMap<String, Endpoint>>;

/// The weight of a pod or a slice.
pub(crate) fn weight(metadata: &ObjectMeta) -> Option<String> {
    metadata.annotations.as_ref()?.get(WEIGHT).cloned()
}

/// Whether a pod can be an endpoint at all.
pub(crate) fn has_endpoint(pod: &Pod, include_terminating: bool) -> bool {
    let has_ip = pod.status.as_ref().and_then(|s| s.pod_ip.as_deref()).is_some_and(|ip| !ip.is_empty());
    has_ip && !pod::is_terminal(pod) && (include_terminating || !pod::is_terminating(pod))
}

/// Addresses of a pod in a family (`IPv4` or `IPv6`).
pub(crate) fn addresses(pod: &Pod, family: &str) -> Vec<String> {
    let Some(status) = &pod.status else { return vec![] };
    let all: Vec<_> = match &status.pod_ips {
        Some(ips) if !ips.is_empty() => ips.iter().map(|ip| ip.ip.clone()).collect(),
        _ => status.pod_ip.iter().cloned().collect(),
    };
    all.into_iter().filter(|ip| ip.contains(':') == (family == "IPv6")).collect()
}

/// The port of a pod that a Service port means: a number, or the container port of that name and protocol.
pub(crate) fn target_port(pod: &Pod, port: &ServicePort) -> Option<i32> {
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    let name = match &port.target_port {
        None => return Some(port.port),
        Some(IntOrString::Int(0)) => return Some(port.port),
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod.spec.as_ref()?;
    // Sidecars (restartable init containers) serve too.
    let sidecars =
        spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|c| c.ports.iter().flatten())
        .find(|p| p.name.as_ref() == Some(name) && p.protocol.as_deref().unwrap_or("TCP") == protocol)
        .map(|p| p.container_port)
}

/// No cluster address.
pub(crate) fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()) == Some("None")
}

/// The ports that a pod serves the Service on; `None` if a Service with ports finds none of them in the pod.
pub(crate) fn ports(service: &Service, pod: &Pod) -> Option<Ports> {
    let wanted = service.spec.as_ref().and_then(|s| s.ports.as_deref()).unwrap_or_default();
    let mut found: Vec<_> = wanted
        .iter()
        .filter_map(|p| {
            Some(Port {
                name: p.name.clone().unwrap_or_default(),
                protocol: p.protocol.clone().unwrap_or_else(|| "TCP".into()),
                port: target_port(pod, p)?,
                app_protocol: p.app_protocol.clone(),
            })
        })
        .collect();
    found.sort();
    (wanted.is_empty() || !found.is_empty()).then_some(Ports(found))
}

/// Whether a Service publishes pods before they are ready.
pub(crate) fn publishes_not_ready(service: &Service) -> bool {
    service.spec.as_ref().and_then(|s| s.publish_not_ready_addresses).unwrap_or(false)
}

/// The hostname under which DNS serves the pod, if it asked for one in this Service's subdomain.
pub(crate) fn hostname(service: &Service, pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let hostname = spec.hostname.clone().filter(|h| !h.is_empty())?;
    (spec.subdomain == service.metadata.name).then_some(hostname)
}

/// The reference from an endpoint back to its pod.
pub(crate) fn target(pod: &Pod) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".into()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}

/// Whom a ready endpoint is for: those of its zone, and those of its node, if the Service's traffic is to stay near
/// (KEP-2433, KEP-3015).
fn hints(service: &Service, ready: bool, zone: Option<&str>, node: &str) -> Option<EndpointHints> {
    let distribution = service.spec.as_ref()?.traffic_distribution.as_deref()?;
    let by_node = match distribution {
        "PreferSameNode" => true,
        "PreferClose" | "PreferSameZone" => false,
        _ => return None,
    };
    let zones = zone.map(|zone| vec![ForZone { name: zone.to_owned() }]);
    let nodes = (by_node && !node.is_empty()).then(|| vec![ForNode { name: node.to_owned() }]);
    let any = zones.is_some() || nodes.is_some();
    (ready && any).then_some(EndpointHints { for_nodes: nodes, for_zones: zones })
}

fn endpoint(service: &Service, pod: &Pod, node: Option<&Node>, addresses: Vec<String>) -> Endpoint {
    let serving = pod::is_ready(pod);
    let terminating = pod::is_terminating(pod);
    let ready = publishes_not_ready(service) || (serving && !terminating);
    let zone = node.and_then(|n| n.metadata.labels.as_ref()?.get(ZONE).cloned());
    Endpoint {
        addresses,
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: hostname(service, pod),
        node_name: Some(pod::node_name(pod)).filter(|n| !n.is_empty()).map(Into::into),
        target_ref: Some(target(pod)),
        hints: hints(service, ready, zone.as_deref(), pod::node_name(pod)),
        zone,
        ..Endpoint::default()
    }
}

/// The endpoints of a Service in one address family, and whether some pod's node isn't known (yet).
pub(crate) fn wanted(
    service: &Service,
    pods: &[Arc<Pod>],
    family: &str,
    node: impl Fn(&str) -> Option<Arc<Node>>,
) -> (Wanted, bool) {
    let (mut wanted, mut node_missing) = (Wanted::new(), false);
    for pod in pods.iter().filter(|p| has_endpoint(p, true)) {
        let addresses = addresses(pod, family);
        let (false, Some(ports)) = (addresses.is_empty(), ports(service, pod)) else { continue };
        let of_node = node(pod::node_name(pod));
        if of_node.is_none() {
            node_missing = true;
            continue;
        }
        let endpoint = endpoint(service, pod, of_node.as_deref(), addresses);
        let group = Group { ports, weight: weight(&pod.metadata) };
        wanted.entry(group).or_default().insert(pod.metadata.uid.clone().unwrap_or_default(), endpoint);
    }
    (wanted, node_missing)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use k8s_openapi::api::core::v1::{Container, ContainerPort, ServiceSpec};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    pub(crate) fn service(target: IntOrString) -> Service {
        let port = ServicePort {
            name: Some("http".into()),
            port: 80,
            protocol: Some("TCP".into()),
            target_port: Some(target),
            ..ServicePort::default()
        };
        Service {
            metadata: ObjectMeta {
                name: Some("web".into()),
                namespace: Some("default".into()),
                uid: Some("svc".into()),
                labels: Some([("app".to_owned(), "web".to_owned())].into()),
                ..ObjectMeta::default()
            },
            spec: Some(ServiceSpec {
                ports: Some(vec![port]),
                cluster_ip: Some("10.43.0.7".into()),
                selector: Some([("app".to_owned(), "web".to_owned())].into()),
                ..ServiceSpec::default()
            }),
            status: None,
        }
    }

    pub(crate) fn endpoint_pod(name: &str, ip: &str, ready: bool) -> Pod {
        let mut pod = pod(name, "Running", ready.then_some(5), "n1");
        pod.status.as_mut().unwrap().pod_ip = Some(ip.into());
        let port = ContainerPort {
            name: Some("www".into()),
            container_port: 8080,
            protocol: Some("TCP".into()),
            ..ContainerPort::default()
        };
        pod.spec.as_mut().unwrap().containers =
            vec![Container { ports: Some(vec![port]), ..Container::default() }];
        pod
    }

    pub(crate) fn node(zone: &str) -> Arc<Node> {
        let labels = Some([(ZONE.to_owned(), zone.to_owned())].into());
        Arc::new(Node { metadata: ObjectMeta { labels, ..ObjectMeta::default() }, ..Node::default() })
    }

    fn one(service: &Service, pod: Pod) -> Option<Endpoint> {
        let (wanted, _) = wanted(service, &[Arc::new(pod)], "IPv4", |_| Some(node("z1")));
        wanted.into_values().next()?.into_values().next()
    }

    #[test]
    fn conditions_follow_readiness_termination_and_publishing() {
        // ready, terminating, publish → ready, serving, terminating
        let rows = [
            (true, false, false, (true, true, false)),
            (false, false, false, (false, false, false)),
            (true, true, false, (false, true, true)),
            (false, true, false, (false, false, true)),
            (false, false, true, (true, false, false)),
            (true, true, true, (true, true, true)),
        ];
        for (ready, terminating, publish, expected) in rows {
            let mut service = service(IntOrString::Int(8080));
            service.spec.as_mut().unwrap().publish_not_ready_addresses = Some(publish);
            let mut pod = endpoint_pod("p", "10.42.0.2", ready);
            if terminating {
                pod.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH));
            }
            let c = one(&service, pod).unwrap().conditions.unwrap();
            assert_eq!((c.ready.unwrap(), c.serving.unwrap(), c.terminating.unwrap()), expected);
        }
    }

    #[test]
    fn hints_keep_traffic_near() {
        // What the Service wants, whether the pod is ready → zones, nodes
        let rows = [
            (None, true, None, None),
            (Some("PreferClose"), true, Some("z1"), None),
            (Some("PreferSameZone"), true, Some("z1"), None),
            (Some("PreferSameNode"), true, Some("z1"), Some("n1")),
            (Some("PreferSameNode"), false, None, None),
        ];
        for (distribution, ready, zone, node) in rows {
            let mut service = service(IntOrString::Int(8080));
            service.spec.as_mut().unwrap().traffic_distribution = distribution.map(str::to_owned);
            let hints = one(&service, endpoint_pod("p", "10.42.0.2", ready)).unwrap().hints;
            let first = |names: Option<Vec<String>>| names.map(|names| names.join(","));
            let hints = hints.unwrap_or_default();
            let zones = hints.for_zones.map(|all| all.into_iter().map(|one| one.name).collect());
            let nodes = hints.for_nodes.map(|all| all.into_iter().map(|one| one.name).collect());
            assert_eq!((first(zones).as_deref(), first(nodes).as_deref()), (zone, node), "{distribution:?}");
        }
    }

    #[test]
    fn an_endpoint_names_its_node_zone_and_pod() {
        let endpoint = one(&service(IntOrString::Int(8080)), endpoint_pod("p", "10.42.0.2", true)).unwrap();
        assert_eq!(endpoint.node_name.as_deref(), Some("n1"));
        assert_eq!(endpoint.zone.as_deref(), Some("z1"));
        assert_eq!(endpoint.target_ref.unwrap().name.as_deref(), Some("p"));
    }

    #[test]
    fn finished_and_addressless_pods_are_no_endpoints() {
        let mut done = endpoint_pod("p", "10.42.0.2", true);
        done.status.as_mut().unwrap().phase = Some("Succeeded".into());
        assert!(one(&service(IntOrString::Int(1)), done).is_none());
        assert!(one(&service(IntOrString::Int(1)), endpoint_pod("p", "", true)).is_none());
        assert!(one(&service(IntOrString::Int(1)), endpoint_pod("p", "fd00::1", true)).is_none());
    }

    #[test]
    fn target_ports_are_numbers_names_or_the_port_itself() {
        let pod = endpoint_pod("p", "10.42.0.2", true);
        let resolved = |target| {
            let port = service(target).spec.unwrap().ports.unwrap().remove(0);
            target_port(&pod, &port)
        };
        assert_eq!(resolved(IntOrString::Int(9090)), Some(9090));
        assert_eq!(resolved(IntOrString::Int(0)), Some(80));
        assert_eq!(resolved(IntOrString::String("www".into())), Some(8080));
        assert_eq!(resolved(IntOrString::String("nope".into())), None);
    }
}
