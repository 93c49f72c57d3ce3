//! Names and hardware addresses that follow from what is known, so that nothing need be remembered to find or remove them.

use std::net::Ipv4Addr;

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

/// The hardware address of who has an address in the pods' subnet. Locally administered. An address that is used again has the
/// same one again, so that nobody's neighbour entry is ever wrong.
pub(crate) fn mac(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    Mac([0x02, 0x77, a, b, c, d])
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
}
