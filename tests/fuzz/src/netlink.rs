//! Frames from the link, and messages from the kernel.

use weft_agent_dataplane::announce::fuzz;
use weft_cni_netlink::fuzz as kernel;

pub(crate) fn arp(bytes: &[u8]) {
    fuzz::arp(bytes);
}

pub(crate) fn ndp(bytes: &[u8]) {
    fuzz::ndp(bytes);
}

pub(crate) fn reply(bytes: &[u8]) {
    kernel::route_reply(bytes);
    kernel::netfilter_reply(bytes);
    kernel::diag_reply(bytes);
}
