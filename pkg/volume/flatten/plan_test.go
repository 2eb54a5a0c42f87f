package flatten

import (
	"strings"
	"testing"

	"github.com/overlay-csi/overlay-csi/pkg/record"
	"github.com/overlay-csi/overlay-csi/pkg/upper"
)

// frozen returns a list of frozen uppers, one for each letter. Those of capitals are disk images, and those of digits have a group.
func frozen(ids string) (list []record.Frozen) {
	for _, id := range ids {
		f := record.Frozen{ID: string(id), Backend: upper.Directory}
		switch {
		case id >= 'A' && id <= 'Z':
			f.Backend = upper.DiskImage
		case id >= '0' && id <= '9':
			f.Group = &record.Group{ID: 7}
		}
		list = append(list, f)
	}
	return list
}

func idsOf(list []record.Frozen) string {
	var ids strings.Builder
	for _, f := range list {
		ids.WriteString(f.ID)
	}
	return ids.String()
}

func TestPlan(t *testing.T) {
	const all = "abcdefghijklmnopqrstuvwxyz"
	for name, test := range map[string]struct {
		lists   []string
		mounted string
		want    string
	}{
		"short":                        {[]string{all[:16]}, "", ""},
		"all of one":                   {[]string{all[:17]}, "", all[:17]},
		"shorter ones do not count":    {[]string{all[:17], all[1:17], all[9:17]}, "", all[:17]},
		"what clones share":            {[]string{"y" + all[:17], "z" + all[:17]}, "", all[:17]},
		"they share too little":        {[]string{"yz" + all[:16], "!#$%&()*+,-./:;" + all[14:16]}, "", "yz" + all[:16]},
		"a mounted one":                {[]string{"y" + all[:17], "z" + all[:17]}, "y", "z" + all[:17]},
		"disk images":                  {[]string{strings.ToUpper(all[:20])}, "", ""},
		"below disk images":            {[]string{"XYZ" + all[:14]}, "", all[:14]},
		"between groups":               {[]string{"12" + all[:18] + "3"}, "", all[:18]},
		"each second one a disk image": {[]string{"aBcDeFgHiJkLmNoPqRs"}, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			var lists []List
			for _, ids := range test.lists {
				lists = append(lists, List{Frozen: frozen(ids), IsMounted: test.mounted != "" && strings.HasPrefix(ids, test.mounted)})
			}
			tried := ""
			run := Plan(lists, func(run []record.Frozen) bool { return idsOf(run) == tried })
			if got := idsOf(run); got != test.want {
				t.Fatalf("got %q, want %q", got, test.want)
			}
			tried = test.want
			if got := idsOf(Plan(lists, func(run []record.Frozen) bool { return idsOf(run) == tried })); got == test.want && got != "" {
				t.Errorf("%q was tried, and is tried again", got)
			}
		})
	}
}

func TestReplaced(t *testing.T) {
	merged := record.Frozen{ID: "M"}
	if got := idsOf(Replaced(frozen("abcde"), frozen("bcd"), merged)); got != "aMe" {
		t.Errorf("got %q", got)
	}
	if got := Replaced(frozen("abcde"), frozen("bd"), merged); got != nil || Has(frozen("abcde"), frozen("bd")) {
		t.Errorf("got %v", got)
	}
	if !Shares(frozen("abc"), frozen("xc")) || Shares(frozen("abc"), frozen("xy")) {
		t.Error("Shares is wrong")
	}
}
