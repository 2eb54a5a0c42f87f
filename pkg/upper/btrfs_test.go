package upper

import (
	"strings"
	"testing"
)

const qgroupTable = `Qgroupid    Referenced    Exclusive   Max referenced   Path
--------    ----------    ---------   --------------   ----
`

func TestParseQgroup(t *testing.T) {
	for name, c := range map[string]struct {
		output      string
		used, limit int64
		fails       bool
	}{
		"limited":  {qgroupTable + "0/257        1064960      1064960         33554432   volumes/v/data\n", 1064960, 33554432, false},
		"no limit": {qgroupTable + "0/256          16384        16384             none   \n", 16384, 0, false},
		"as older programs": {
			"qgroupid         rfer         excl     max_rfer  \n" +
				"--------         ----         ----     --------  \n0/258           16384        16384     67108864  ", 16384, 67108864, false},
		"none":               {qgroupTable, 0, 0, true},
		"of a higher level":  {qgroupTable + "1/100 1 1 none", 0, 0, true},
		"no number":          {qgroupTable + "0/257 many 1 none", 0, 0, true},
		"limit is no number": {qgroupTable + "0/257 1 1 much", 0, 0, true},
		"nothing":            {"", 0, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			used, limit, err := parseQgroup(c.output)
			if (err != nil) != c.fails || (!c.fails && (used != c.used || limit != c.limit)) {
				t.Errorf("%d of %d, %v", used, limit, err)
			}
		})
	}
}

func FuzzParseQgroup(f *testing.F) {
	f.Add(qgroupTable + "0/257        1064960      1064960         33554432   volumes/v/data\n")
	f.Add("0/1 2 3 none")
	f.Fuzz(func(t *testing.T, output string) {
		used, limit, err := parseQgroup(output)
		if err == nil && (used < 0 || limit < 0) {
			t.Errorf("%d of %d", used, limit)
		}
		if err == nil && !strings.Contains(output, "0/") {
			t.Error("there was no qgroup")
		}
	})
}
