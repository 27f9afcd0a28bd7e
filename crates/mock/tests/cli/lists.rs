//! Lists that scripts made for xl ask for.

use crate::common::Bench;

#[test]
fn claims_and_sharing_have_the_columns_of_xl() {
    let bench = Bench::new();
    bench.create("one", &["memory=64"]);
    let rows = |text: &str| -> Vec<Vec<String>> {
        let rows = text.lines().skip(1);
        rows.map(|row| row.split_whitespace().map(String::from).collect())
            .collect()
    };
    let claims = bench.ok(&["claims"]);
    assert!(
        claims.starts_with(
            "Name                                        ID   Mem VCPUs\tState\tTime(s)  Claimed\nDomain-0 "
        ),
        "{claims}"
    );
    let table = rows(&claims);
    assert_eq!((table[0].len(), &table[0][6][..]), (7, "0"));
    // The guest has used nothing.
    assert_eq!(
        table[1],
        ["one", "1", "64", "1", "-b----", "1.5", "64"],
        "{claims}"
    );
    assert!(
        claims.ends_with("     -b----       1.5    64\n"),
        "{claims}"
    );
    let sharing = bench.ok(&["sharing"]);
    assert!(
        sharing
            .starts_with("Name                                        ID   Mem Shared\nDomain-0 "),
        "{sharing}"
    );
    assert_eq!(rows(&sharing)[1], ["one", "1", "64", "0"]);
    assert_eq!(rows(&bench.ok(&["sharing", "1"])).len(), 1);
    bench.fails(1, &["sharing", "two"]);
    bench.fails(2, &["sharing", "one", "one"]);
}

#[test]
fn lists_of_what_there_is_not_are_empty() {
    let bench = Bench::new();
    bench.create("one", &[]);
    for (list, heading, goes_on) in [
        ("pci-list", None, false),
        ("usb-list", None, false),
        (
            "channel-list",
            Some("Idx BE state evt-ch ring-ref connection"),
            false,
        ),
        (
            "vkb-list",
            Some("Idx BE handle state evt-ch    ref ID         BE-type    BE-path"),
            false,
        ),
        (
            "vtpm-list",
            Some(
                "Idx BE Uuid                                 handle state evt-ch ring-ref BE-path",
            ),
            true,
        ),
        ("vdispl-list", None, true),
        ("vsnd-list", None, true),
    ] {
        for who in ["one", "1", "0"] {
            let text = bench.ok(&[list, who]);
            assert_eq!(text.lines().next().map(str::trim_end), heading, "{list}");
            assert!(text.lines().count() <= 1, "{text}");
        }
        let output = bench.run(&[list, "nobody"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("nobody is an invalid domain"), "{said}");
        assert_eq!(output.status.success(), goes_on, "{list}");
        bench.fails(2, &[list]);
    }
    assert_eq!(bench.ok(&["pci-assignable-list"]), "");
    assert_eq!(bench.ok(&["pci-assignable-list", "-n"]), "");
}
