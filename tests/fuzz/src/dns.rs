//! DNS queries and resolv.conf.

use std::sync::LazyLock;

use weft_agent_dns::fuzz::Server;

static SERVER: LazyLock<Server> = LazyLock::new(|| Server::new().expect("cluster.local is a domain"));

pub(crate) fn query(bytes: &[u8]) {
    let over_tcp = SERVER.query(bytes, false);
    let over_udp = SERVER.query(bytes, true);
    assert_eq!(over_tcp.is_some(), over_udp.is_some());
    if let Ok(text) = std::str::from_utf8(bytes) {
        let upstreams = weft_agent_dns::upstreams(text, &[]);
        assert!(upstreams.iter().all(|upstream| upstream.port() == 53));
    }
}
