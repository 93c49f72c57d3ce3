//! Whether a connection came about, as the packets of its flow tell.

use weft_ebpf_abi::{Address, BackendKey, FLOW_REPLY, FLOW_WATCHED, FlowKey, FlowValue, Port};

use crate::packet::{ACK, RST, SYN};

/// What a packet says of the connection that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connecting {
    /// Nothing: it is nobody's concern, or was told before.
    Nothing,
    /// The backend takes it.
    Answered,
    /// The backend's first answer is a reset.
    Refused,
    /// The client asks again: it got no answer.
    Unanswered,
}

/// Judges a packet of a known flow. The entry is watched until it has told: that of the answers until the first one, that of the client
/// until it has asked twice.
#[inline(always)]
#[must_use]
pub const fn judge(entry: &FlowValue, tcp_flags: u8) -> Connecting {
    if entry.flags & FLOW_WATCHED == 0 {
        return Connecting::Nothing;
    }
    if entry.flags & FLOW_REPLY == 0 {
        return if tcp_flags & (SYN | ACK | RST) == SYN {
            Connecting::Unanswered
        } else {
            Connecting::Nothing
        };
    }
    if tcp_flags & RST != 0 {
        return Connecting::Refused;
    }
    if tcp_flags & (SYN | ACK) == SYN | ACK { Connecting::Answered } else { Connecting::Nothing }
}

/// The backend of a flow, from the packet as it came and the entry that it met.
#[inline(always)]
#[must_use]
pub const fn backend(key: &FlowKey, entry: &FlowValue) -> BackendKey {
    if entry.flags & FLOW_REPLY != 0 {
        BackendKey { address: key.source, port: key.source_port, protocol: key.protocol, pad: 0 }
    } else {
        crate::flow::backend(entry, key.protocol)
    }
}

/// The Service's address and port that the client of a flow asked for, likewise.
#[inline(always)]
#[must_use]
pub const fn asked(key: &FlowKey, entry: &FlowValue) -> (Address, Port) {
    if entry.flags & FLOW_REPLY != 0 {
        (entry.source, entry.source_port)
    } else {
        (key.destination, key.destination_port)
    }
}

#[cfg(test)]
mod tests {
    use weft_ebpf_abi::TCP;

    use super::*;
    use crate::flow;

    const BACKEND: BackendKey =
        BackendKey { address: Address::v4([10, 42, 0, 5]), port: Port::new(8080), protocol: TCP, pad: 0 };

    /// A client's packet and both entries of its flow.
    fn watched() -> (FlowKey, FlowValue, FlowValue) {
        let key = FlowKey {
            source: Address::v4([10, 42, 1, 7]),
            destination: Address::v4([10, 43, 0, 1]),
            source_port: Port::new(4_000),
            destination_port: Port::new(80),
            protocol: TCP,
            pad: [0; 3],
        };
        let mut forward = flow::forward(&BACKEND, (key.source, Port::new(61_000)), 3, 1);
        forward.flags |= FLOW_WATCHED;
        let mut reply = flow::reply(&key, 2, 1);
        reply.flags |= FLOW_WATCHED;
        (key, forward, reply)
    }

    #[test]
    fn the_first_answer_and_a_second_question_tell() {
        let (_, forward, reply) = watched();
        let rows = [
            (&reply, SYN | ACK, Connecting::Answered),
            (&reply, RST | ACK, Connecting::Refused),
            (&reply, ACK, Connecting::Nothing),
            (&forward, SYN, Connecting::Unanswered),
            (&forward, ACK, Connecting::Nothing),
            (&forward, RST, Connecting::Nothing),
        ];
        for (entry, flags, wanted) in rows {
            assert_eq!(judge(entry, flags), wanted, "{flags:#x}");
            let told = FlowValue { flags: entry.flags & !FLOW_WATCHED, ..*entry };
            assert_eq!(judge(&told, flags), Connecting::Nothing, "{flags:#x}: it was told before");
        }
    }

    #[test]
    fn both_directions_name_the_backend_and_what_was_asked() {
        let (key, forward, reply) = watched();
        let answer = flow::reply_key(&forward, TCP);
        assert_eq!(backend(&key, &forward), BACKEND);
        assert_eq!(backend(&answer, &reply), BACKEND);
        let wanted = (key.destination, key.destination_port);
        assert_eq!(asked(&key, &forward), wanted);
        assert_eq!(asked(&answer, &reply), wanted);
    }
}
