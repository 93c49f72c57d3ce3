//! The peer: the rules that kube-proxy in iptables mode makes of a NodePort over UDP with one endpoint.

use std::net::Ipv4Addr;

use crate::service::iptables::FILTER;

/// The input of iptables-restore. Chains and their order are kube-proxy's.
pub(super) fn text(node_port: u16, pod: Ipv4Addr, port: u16) -> String {
    let name = "-m comment --comment default/backend";
    format!(
        "{FILTER}*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-EXT-0 - [0:0]
:KUBE-SVC-0 - [0:0]
:KUBE-SEP-0 - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p udp {name} -m udp --dport {node_port} -j KUBE-EXT-0
-A KUBE-EXT-0 {name} -j KUBE-MARK-MASQ
-A KUBE-EXT-0 -j KUBE-SVC-0
-A KUBE-SVC-0 {name} -j KUBE-SEP-0
-A KUBE-SEP-0 -s {pod}/32 {name} -j KUBE-MARK-MASQ
-A KUBE-SEP-0 -p udp {name} -m udp -j DNAT --to-destination {pod}:{port}
COMMIT
"
    )
}
