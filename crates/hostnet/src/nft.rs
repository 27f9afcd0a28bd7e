//! The firewall's part of a NAT network: one table of our own in nftables, made and removed as a whole.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::Error;
use crate::{subnet, tools};

/// What the table is to do.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    pub bridge: &'a str,
    pub gateway_v4: Ipv4Addr,
    /// Given where the host forwards IPv6.
    pub gateway_v6: Option<Ipv6Addr>,
}

/// The program that loads them comes from this package.
const PACKAGE: &str = "nftables";

/// The table of the bridge.
fn table(bridge: &str) -> String {
    format!("inet {bridge}")
}

/// The rules as `nft -f` reads them. The table is made before it is deleted, so that the deletion never fails; all of it happens at once.
fn ruleset(rules: &Rules<'_>) -> String {
    let (bridge, table) = (rules.bridge, table(rules.bridge));
    let [a, b, c, _] = rules.gateway_v4.octets();
    let v6 = match rules.gateway_v6 {
        Some(gateway) => {
            let network = subnet::network_v6(gateway);
            format!(
                "\n        ip6 saddr {network}/64 ip6 daddr != {network}/64 oifname != \"{bridge}\" masquerade"
            )
        }
        None => String::new(),
    };
    format!(
        r#"table {table}
delete table {table}
table {table} {{
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
        ip saddr {a}.{b}.{c}.0/24 ip daddr != {{ {a}.{b}.{c}.0/24, 224.0.0.0/4, 255.255.255.255 }} masquerade{v6}
    }}
    chain forward {{
        type filter hook forward priority 0; policy accept;
        iifname "{bridge}" accept
        oifname "{bridge}" ct state established,related accept
        oifname "{bridge}" drop
    }}
}}
"#
    )
}

/// Loads the rules in place of those that were there.
pub fn load(rules: &Rules<'_>) -> Result<(), Error> {
    let nft = tools::need("nft", PACKAGE)?;
    tools::run(&nft, &["-f", "-"], &ruleset(rules))
}

/// Removes the table; nothing happens without one.
pub fn unload(bridge: &str) -> Result<(), Error> {
    let nft = tools::need("nft", PACKAGE)?;
    let table = table(bridge);
    tools::run(
        &nft,
        &["-f", "-"],
        &format!("table {table}\ndelete table {table}\n"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ruleset_names_the_networks() {
        let text = ruleset(&Rules {
            bridge: "hospes0",
            gateway_v4: Ipv4Addr::new(10, 107, 3, 1),
            gateway_v6: Some("fd12:3456:789a:1::1".parse().unwrap()),
        });
        assert!(text.contains("ip saddr 10.107.3.0/24"), "{text}");
        assert!(text.contains("ip6 saddr fd12:3456:789a:1::/64"), "{text}");
    }
}
