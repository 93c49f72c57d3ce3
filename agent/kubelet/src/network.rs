//! What a pod asks of its network: ports of the node that lead to it, bounds on its traffic.

use k8s_openapi::api::core::v1::Pod;
use weft_agent_runtime::{Bandwidth, Error, PortMapping};

use crate::pod;
use crate::quantity;

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// Bits in a second that upstream takes for sensible: 1k to 1P.
const SENSIBLE: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// The `hostPort`s of what runs as long as the pod does; a pod of the node's own network has them already.
pub(crate) fn port_mappings(pod: &Pod) -> Vec<PortMapping> {
    if pod::host_network(pod) {
        return Vec::new();
    }
    let lasting = pod::all_containers(pod).filter(|(container, init)| !init || pod::is_sidecar(container));
    let ports = lasting.flat_map(|(container, _)| container.ports.iter().flatten());
    let number = |port: i32| u16::try_from(port).ok().filter(|port| *port > 0);
    let mapping = ports.filter_map(|port| {
        Some(PortMapping {
            host_port: number(port.host_port?)?,
            container_port: number(port.container_port)?,
            protocol: port.protocol.as_deref().unwrap_or("TCP").to_ascii_lowercase(),
            host_ip: port.host_ip.clone().unwrap_or_default(),
        })
    });
    mapping.collect()
}

/// The bounds that annotations ask for.
///
/// # Errors
/// If one is no quantity, or not a sensible one.
pub(crate) fn bandwidth(pod: &Pod) -> Result<Bandwidth, Error> {
    let asked = |name: &str| {
        let Some(text) = pod.metadata.annotations.as_ref().and_then(|all| all.get(name)) else {
            return Ok(None);
        };
        let bits = quantity::milli(text).and_then(|milli| u64::try_from(milli / 1000).ok());
        match bits.filter(|bits| SENSIBLE.contains(bits)) {
            Some(bits) => Ok(Some(bits)),
            None => Err(Error::Invalid {
                what: "bound a pod's traffic",
                reason: format!("annotation {name}: {text:?} is not between 1k and 1P"),
            }),
        }
    };
    Ok(Bandwidth { ingress_bits_per_second: asked(INGRESS)?, egress_bits_per_second: asked(EGRESS)? })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(value: Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn maps_the_ports_of_what_lasts() {
        let spec = |host_network: bool| {
            let port = |number: i32| json!({"containerPort": 80, "hostPort": number});
            json!({"hostNetwork": host_network,
            "containers": [
                {"name": "a", "ports": [port(8080), {"containerPort": 81}, port(0)]},
                {"name": "b", "ports": [{"containerPort": 53, "hostPort": 5353, "protocol": "UDP", "hostIP": "127.0.0.1"}]},
            ],
            "initContainers": [
                {"name": "once", "ports": [port(9000)]},
                {"name": "side", "restartPolicy": "Always", "ports": [port(9001)]},
            ]})
        };
        let mapped = port_mappings(&pod(json!({"spec": spec(false)})));
        let mut ports: Vec<u16> = mapped.iter().map(|one| one.host_port).collect();
        ports.sort_unstable();
        assert_eq!(ports, [5353, 8080, 9001]);
        let udp = mapped.iter().find(|one| one.host_port == 5353).unwrap();
        assert_eq!(
            (udp.protocol.as_str(), udp.host_ip.as_str(), udp.container_port),
            ("udp", "127.0.0.1", 53)
        );
        assert_eq!(port_mappings(&pod(json!({"spec": spec(true)}))), []);
    }

    #[test]
    fn reads_bounds_from_annotations() {
        let with = |ingress: &str| {
            bandwidth(&pod(
                json!({"metadata": {"annotations": {"kubernetes.io/ingress-bandwidth": ingress}}}),
            ))
        };
        assert_eq!(with("10M").unwrap().ingress_bits_per_second, Some(10_000_000));
        assert_eq!(with("10M").unwrap().egress_bits_per_second, None);
        for wrong in ["fast", "999", "2P", "-1M", ""] {
            assert!(with(wrong).is_err(), "{wrong}");
        }
        assert_eq!(bandwidth(&pod(json!({}))).unwrap(), Bandwidth::default());
    }
}
