//! Names and hardware addresses that follow from what is known, so that nothing need be remembered to find or remove them.

use std::net::IpAddr;

use weft_cni_ipam::Owner;
use weft_cni_netlink::Mac;

/// The host's end of a pod's pair: 15 bytes, the most that the kernel takes. 44 bits of FNV-1a over network and owner:
/// among 1,000 pods of a node two meet once in 35 million nodes, and then the second ADD fails cleanly.
pub(crate) fn host_interface(network: &str, owner: &Owner) -> String {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let parts = [network, "/", &owner.container, "/", &owner.ifname];
    let bytes = parts.into_iter().flat_map(str::bytes);
    let hash = bytes.fold(BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
    format!("weft{:011x}", (hash ^ (hash >> 44)) & ((1 << 44) - 1))
}

/// The hardware address of who has these addresses in the pods' subnets: it follows from the IPv4 one, or else from the first.
/// Locally administered. Addresses that are used again have the same one again, so that nobody's neighbour entry is ever wrong.
pub(crate) fn mac(addresses: impl IntoIterator<Item = IpAddr> + Clone) -> Mac {
    let v4 = addresses.clone().into_iter().find(IpAddr::is_ipv4);
    match v4.or_else(|| addresses.into_iter().next()) {
        Some(IpAddr::V4(address)) => {
            let [a, b, c, d] = address.octets();
            Mac([0x02, 0x77, a, b, c, d])
        }
        Some(IpAddr::V6(address)) => {
            // Subnets count from their low end; what is above is folded in for those who ask for an address of their own.
            let [_, _, _, _, h, i, j, k] = address.segments();
            let ([a, b], [c, d]) = ((h ^ j).to_be_bytes(), (i ^ k).to_be_bytes());
            Mac([0x02, 0x76, a, b, c, d])
        }
        None => Mac([0x02, 0x77, 0, 0, 0, 0]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_interfaces_fit_and_differ() {
        let owner = |container: &str| Owner { container: container.to_owned(), ifname: "eth0".to_owned() };
        let names: std::collections::HashSet<String> =
            (0..10_000).map(|n| host_interface("weft", &owner(&format!("{n:064x}")))).collect();
        assert_eq!(names.len(), 10_000);
        assert!(names.iter().all(|name| name.len() == 15));
        assert_ne!(host_interface("a", &owner("x")), host_interface("b", &owner("x")));
    }

    #[test]
    fn hardware_addresses_follow_from_addresses() {
        let mac = |addresses: &[&str]| {
            let addresses: Vec<IpAddr> = addresses.iter().map(|one| one.parse().unwrap()).collect();
            mac(addresses).to_string()
        };
        assert_eq!(mac(&["10.42.1.7"]), "02:77:0a:2a:01:07");
        assert_eq!(mac(&["fd00:42::7", "10.42.1.7"]), "02:77:0a:2a:01:07");
        assert_eq!(mac(&["fd00:42::7"]), "02:76:00:00:00:07");
        assert_ne!(mac(&["fd00:42::1:0:0:7"]), mac(&["fd00:42::7"]));
    }
}
