//! Why traffic was not let through, numbered once for programs, metrics and command line.

/// A reason. Numbers are never used again for another meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DropReason {
    /// A socket asked for a Service without endpoints.
    SocketNoEndpoints = 1,
    /// A socket asked for a port that the cluster address does not serve.
    SocketUnknownPort = 2,
    /// A packet for a Service without endpoints; answered with a reset, an ABORT of SCTP, or "port unreachable".
    PacketNoEndpoints = 3,
    /// A packet for a port that the cluster address does not serve; answered likewise.
    PacketUnknownPort = 4,
    /// A packet of TCP or SCTP whose backend is gone; answered with a reset or an ABORT.
    BackendGone = 5,
    /// A packet of TCP or SCTP in the middle of a connection that is not known; answered likewise.
    UnknownFlow = 6,
    /// No free source port towards the backend.
    NatPortsExhausted = 7,
    /// The node has no route to the backend, or none back to a client that it should answer; or the backend is the end of a tunnel between
    /// nodes, into which nobody else is led.
    NoRoute = 8,
    /// The kernel refused to rewrite the packet.
    RewriteFailed = 9,
    /// The flow could not be recorded.
    FlowTableFull = 10,
    /// The Service's source ranges do not name the client.
    SourceNotAllowed = 11,
    /// This node has no endpoint, another has (externalTrafficPolicy Local).
    NoLocalEndpoints = 12,
    /// No NetworkPolicy allows the packet into the pod.
    PolicyIngress = 13,
    /// No NetworkPolicy allows the packet out of the pod.
    PolicyEgress = 14,
    /// A packet larger than the next link takes; answered with ICMP "fragmentation needed" or "packet too big".
    PacketTooBig = 15,
}

impl DropReason {
    /// Entries of the counters' map; index 0 is unused.
    pub const COUNT: u32 = 16;

    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::SocketNoEndpoints,
        Self::SocketUnknownPort,
        Self::PacketNoEndpoints,
        Self::PacketUnknownPort,
        Self::BackendGone,
        Self::UnknownFlow,
        Self::NatPortsExhausted,
        Self::NoRoute,
        Self::RewriteFailed,
        Self::FlowTableFull,
        Self::SourceNotAllowed,
        Self::NoLocalEndpoints,
        Self::PolicyIngress,
        Self::PolicyEgress,
        Self::PacketTooBig,
    ];

    /// The name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SocketNoEndpoints => "socket_no_endpoints",
            Self::SocketUnknownPort => "socket_unknown_port",
            Self::PacketNoEndpoints => "packet_no_endpoints",
            Self::PacketUnknownPort => "packet_unknown_port",
            Self::BackendGone => "backend_gone",
            Self::UnknownFlow => "unknown_flow",
            Self::NatPortsExhausted => "nat_ports_exhausted",
            Self::NoRoute => "no_route",
            Self::RewriteFailed => "rewrite_failed",
            Self::FlowTableFull => "flow_table_full",
            Self::SourceNotAllowed => "source_not_allowed",
            Self::NoLocalEndpoints => "no_local_endpoints",
            Self::PolicyIngress => "policy_ingress",
            Self::PolicyEgress => "policy_egress",
            Self::PacketTooBig => "packet_too_big",
        }
    }
}

const _: () = assert!(DropReason::ALL.len() + 1 == DropReason::COUNT as usize);
